"use strict";
(function () {
  const root = document.documentElement;

  // Theme: auto, light, dark; the choice is remembered where the browser allows it.
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  let theme = "auto";
  try { theme = localStorage.getItem("promptkd-theme") || "auto"; } catch (error) { /* private */ }
  function applyTheme() {
    if (!themes.includes(theme)) theme = "auto";
    if (theme === "auto") root.removeAttribute("data-theme");
    else root.setAttribute("data-theme", theme);
    button.textContent = "Theme: " + theme;
  }
  button.hidden = false;
  button.addEventListener("click", function () {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try { localStorage.setItem("promptkd-theme", theme); } catch (error) { /* private */ }
    applyTheme();
  });
  applyTheme();

  // The browser of responses. Texts only ever enter the page as text nodes.
  const holder = document.getElementById("browser-data");
  if (!holder) return;
  const sets = JSON.parse(holder.textContent);
  const PAGE = 10, LONG = 700;
  const get = function (name) { return document.getElementById("browser-" + name); };
  const element = function (tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  let page = 0, shown = [], current = sets[0];

  function fill(select, options, chosen) {
    select.replaceChildren();
    options.forEach(function (option) {
      const made = element("option", "", option[1]);
      made.value = option[0];
      select.append(made);
    });
    select.value = chosen;
  }

  // The responses of the chosen seed, or of all.
  function seen(item, place) {
    const seed = get("seed").value;
    if (seed === "") return item.responses[place];
    return item.responses[place].filter(function (r) { return String(r.seed) === seed; });
  }

  function scoreOf(item, place) {
    const known = seen(item, place).filter(function (r) { return r.score !== null; });
    if (!known.length) return null;
    return known.reduce(function (sum, r) { return sum + r.score; }, 0) / known.length;
  }

  function gain(item) {
    const own = scoreOf(item, Number(get("model").value));
    if (get("other").value === "") return own;
    const other = scoreOf(item, Number(get("other").value));
    return own === null || other === null ? null : own - other;
  }

  function chooseSet() {
    current = sets[Number(get("set").value)];
    const models = current.models.map(function (m, place) { return [String(place), m.label]; });
    const steps = current.models[0].role === "step";
    const rival = current.models.findIndex(function (m) { return m.role === "start"; });
    const other = steps ? 0 : rival > 0 ? rival : models.length > 1 ? 1 : "";
    fill(get("model"), models, steps ? String(models.length - 1) : "0");
    fill(get("other"), [["", "nothing"]].concat(models), String(other));
    get("other-label").hidden = models.length < 2;
    const seeds = current.seeds.map(function (seed) { return [String(seed), String(seed)]; });
    fill(get("seed"), seeds.concat([["", "all"]]), seeds.length ? seeds[0][0] : "");
    get("seed-label").hidden = seeds.length < 2;
    const scored = current.items.some(function (item) {
      return item.responses.some(function (_, place) { return scoreOf(item, place) !== null; });
    });
    const sorts = [["row", "by row"]];
    if (scored) sorts.push(["gain", "largest gain"], ["loss", "largest loss"]);
    fill(get("sort"), sorts, "row");
    select();
  }

  function matches(item, words) {
    const text = [item.request].concat(item.references, item.responses.flatMap(function (_, place) {
      return seen(item, place).map(function (r) { return r.text; });
    })).join("\n").toLowerCase();
    return words.every(function (word) { return text.includes(word); });
  }

  function searched() {
    return get("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  }

  function select() {
    const words = searched(), sort = get("sort").value;
    shown = current.items.filter(function (item) { return matches(item, words); });
    const sign = sort === "gain" ? -1 : 1;
    shown.sort(function (a, b) {
      if (sort === "row") return a.row - b.row;
      const first = gain(a), second = gain(b);
      if (first === null || second === null) return (first === null) - (second === null);
      return sign * (first - second) || a.row - b.row;
    });
    page = 0;
    draw();
  }

  // A text node per piece, so that nothing in the text can be markup.
  function marked(parent, text, words) {
    const lower = text.toLowerCase();
    if (!words.length || lower.length !== text.length) { parent.append(text); return; }
    let from = 0;
    while (from < text.length) {
      let at = -1, found = "";
      words.forEach(function (word) {
        const place = lower.indexOf(word, from);
        if (place >= 0 && (at < 0 || place < at)) { at = place; found = word; }
      });
      if (at < 0) break;
      parent.append(text.slice(from, at), element("mark", "", text.slice(at, at + found.length)));
      from = at + found.length;
    }
    parent.append(text.slice(from));
  }

  function textBlock(className, text, words, label) {
    const block = element("div");
    const body = element("p", className);
    if (label) body.append(element("b", "", label), " ");
    marked(body, text, words);
    block.append(body);
    if (text.length > LONG || text.split("\n").length > 10) {
      body.classList.add("clamped");
      const more = element("button", "more", "Show all");
      more.type = "button";
      more.setAttribute("aria-expanded", "false");
      more.addEventListener("click", function () {
        const open = !body.classList.toggle("clamped");
        more.textContent = open ? "Show less" : "Show all";
        more.setAttribute("aria-expanded", String(open));
      });
      block.append(more);
    }
    return block;
  }

  function responseBlock(response, model, words) {
    const box = element("div", "response " + model.role);
    const who = element("p", "who");
    who.append(element("b", "", model.label));
    const facts = [];
    if (response.score !== null) facts.push(current.score_name + " " + response.score.toFixed(1));
    facts.push(response.tokens + " tokens");
    if (get("seed").value === "") facts.push("seed " + response.seed);
    who.append(" " + facts.join(", "));
    if (!response.ended) who.append(", ", element("span", "cut", "cut at the limit"));
    box.append(who);
    if (response.text === "") box.append(element("p", "empty", "(empty)"));
    else box.append(textBlock("text", response.text, words));
    return box;
  }

  function draw() {
    const words = searched(), list = get("items");
    list.replaceChildren();
    shown.slice(page * PAGE, (page + 1) * PAGE).forEach(function (item) {
      const entry = element("li", "item");
      entry.dataset.row = item.row;
      const difference = get("other").value === "" ? null : gain(item);
      let heading = "Row " + item.row;
      if (difference !== null) {
        const size = Math.abs(difference).toFixed(1);
        const sign = Number(size) === 0 ? "\u00b1" : difference < 0 ? "\u2212" : "+";
        heading += ", " + current.score_name + " " + sign + size + " against " +
          current.models[Number(get("other").value)].label;
      }
      entry.append(element("p", "row", heading), textBlock("request", item.request, words));
      if (item.told) entry.append(textBlock("reference", item.told, words, "The teacher read"));
      item.references.forEach(function (reference) {
        entry.append(textBlock("reference", reference, words, "Reference"));
      });
      const columns = element("div", "columns");
      current.models.forEach(function (model, place) {
        seen(item, place).forEach(function (response) {
          columns.append(responseBlock(response, model, words));
        });
      });
      entry.append(columns);
      list.append(entry);
    });
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    get("status").textContent = [
      shown.length + " of " + current.items.length + " requests; " + current.about + ".",
      current.note,
    ].join(" ").trim();
    get("page").textContent = "Page " + (page + 1) + " of " + pages;
    get("previous").disabled = page === 0;
    get("next").disabled = page === pages - 1;
    get("pages").hidden = pages === 1;
  }

  function turn(by) {
    page += by;
    draw();
    document.getElementById("responses").scrollIntoView();
  }

  fill(get("set"), sets.map(function (set, place) { return [String(place), set.name]; }), "0");
  get("set").addEventListener("change", chooseSet);
  ["sort", "model", "other", "seed"].forEach(function (name) {
    get(name).addEventListener("change", select);
  });
  get("search").addEventListener("input", select);
  get("controls").addEventListener("submit", function (event) { event.preventDefault(); });
  get("previous").addEventListener("click", function () { turn(-1); });
  get("next").addEventListener("click", function () { turn(1); });
  get("controls").hidden = false;
  chooseSet();
})();
