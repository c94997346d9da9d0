"""Generating responses with vLLM, in this process; the student's weights are pushed before.

vLLM is optional (docs/quickstart.md) and imported only when chosen. Its tokens are sampled by
``sampling.TokenSampler``, as every engine's: up to rounding, the responses are the same.
"""

import copy
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.distributed
from peft.tuners.tuners_utils import BaseTunerLayer

from promptkd import vllm_options
from promptkd.errors import UserError
from promptkd.generation.decoder import Tokens, histories
from promptkd.generation.responses_bar import Progress, unseen
from promptkd.generation.sampling import GenerationSettings, TokenSampler
from promptkd.generation.transformers_engine import Response
from promptkd.models.language_model import LanguageModel

CPU_CACHE_GIB = 2
COMPARED = 4
"""Tokens that are written to compare vLLM with the student, once."""
NEAR = {torch.float32: 1e-2, torch.bfloat16: 0.5}
"""Nats between two tokens that rounding may make change places."""


class VLLMEngine:
    """A copy of the student inside vLLM.

    Attributes:
        alone: whether it is the only one that this process will have; see ``expect_several``.

    Args:
        model: the student, or another model.
        stop_ids: the tokens that end a response.
        max_tokens: of a request and its response together.
        options: of ``vllm.LLM``, from the recipe's ``sampling.vllm``.
        learns: whether the model changes between calls; else its weights are pushed once.

    Raises:
        UserError: if vLLM isn't installed, or doesn't know an option.
    """

    alone: ClassVar[bool] = True

    def __init__(
        self,
        model: LanguageModel,
        stop_ids: Sequence[int],
        max_tokens: int,
        *,
        options: Mapping[str, Any] = MappingProxyType({}),
        learns: bool = True,
    ):
        self.stop_ids = torch.tensor(stop_ids, device=model.device)
        self.progress: Progress = unseen
        self._model = model
        self._learns = learns
        self._proven = False
        self._sleeps, self._is_asleep = vllm_options.sleeps(dict(options)), False
        vllm = _import_vllm()
        expect_several()
        self._parameters = vllm.SamplingParams
        with tempfile.TemporaryDirectory() as directory, _own_threads_back():
            config = copy.deepcopy(model.module.config)
            config.get_text_config().vocab_size = model.vocabulary  # the shared rows alone
            config.save_pretrained(directory)
            given = self._set_by_the_run(max_tokens) | dict(options)
            try:
                self._engine = vllm.LLM(directory, **given)
            except (TypeError, ValueError) as error:  # unknown options, and senseless values
                raise UserError(
                    f"sampling.vllm is {dict(options)}, which vLLM doesn't take: {error}. "
                    "Leave out what it doesn't know, or use sampling.engine=transformers."
                ) from None

    def _set_by_the_run(self, max_tokens: int) -> dict[str, Any]:
        """Options of ``vllm.LLM``; the recipe's go before ``enforce_eager`` and the share."""
        model = self._model
        of_gpu: dict[str, Any] = {}
        if model.device.type == "cuda":
            of_gpu["gpu_memory_utilization"] = vllm_options.SHARE
            if torch.distributed.is_initialized():  # else every rank's engine takes card 0
                of_gpu["distributed_executor_backend"] = "external_launcher"
        return of_gpu | {
            "enforce_eager": model.device.type != "cuda",  # on a GPU, CUDA graphs
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": max_tokens,
            "generation_config": "vllm",
            "disable_log_stats": True,
            "async_scheduling": False,  # a token is chosen by all that came before it
            "logits_processors": [_chosen_tokens()],
        }

    def generate(
        self,
        requests: Sequence[Tokens],
        seeds: Sequence[Sequence[int]],
        decoding: GenerationSettings,
    ) -> list[Response]:
        """One response per request, in the order of the requests; see ``TransformersEngine``."""
        with _own_threads_back(), self._awake():
            if self._learns or self._sleeps or not self._proven:  # asleep, it forgets them
                self._push_weights()
            if not self._proven and requests:
                self._compare(requests[0])
                self._proven = True
            return self._written(requests, seeds, decoding)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """With vLLM's memory, if it sleeps between: weights and cache are forgotten, and pushed."""
        if not self._sleeps:
            yield
            return
        if self._is_asleep:
            self._engine.wake_up()
        yield
        self._engine.sleep(level=2)
        self._is_asleep = True

    def _written(
        self,
        requests: Sequence[Tokens],
        seeds: Sequence[Sequence[int]],
        decoding: GenerationSettings,
    ) -> list[Response]:
        choose = TokenSampler(decoding)
        outputs = self._engine.generate(
            [{"prompt_token_ids": list(request)} for request in requests],
            [self._sampling(choose, seed, decoding) for seed in seeds],
            use_tqdm=False,
        )
        assert len(outputs) == len(requests)
        self.progress(len(outputs))
        return [Response(tuple(output.outputs[0].token_ids)) for output in outputs]

    @torch.no_grad()
    def _compare(self, request: Tokens) -> None:
        """After the first push: what vLLM writes greedily is what the student finds likeliest.

        Raises:
            UserError: if it holds other weights, or computes something else with them.
        """
        (written,) = self._written([request], [(0,)], GenerationSettings(COMPARED, temperature=0.0))
        new, model = list(written.token_ids), self._model
        tokens = torch.tensor([[*request, *new]], device=model.device)
        hidden = model.hidden_states(tokens)[0, len(request) - 1 : -1]
        logprobs = model.head.logprobs(hidden)
        chosen = logprobs[torch.arange(len(new)), torch.tensor(new, device=model.device)]
        worst = (logprobs.amax(-1) - chosen).max().item()
        if not worst < NEAR[model.dtype]:
            raise UserError(
                "vLLM writes something else than the student: a token that it chose is "
                f"{worst:.2g} nats less likely than the likeliest. Use "
                "sampling.engine=transformers; please report the model."
            )

    def _sampling(
        self, choose: TokenSampler, seed: Sequence[int], decoding: GenerationSettings
    ) -> Any:
        return self._parameters(
            max_tokens=decoding.max_new_tokens,
            temperature=0.0,  # the scores say which token was chosen
            extra_args={"choose": choose, "uniforms": choose.uniforms(seed)},
            stop_token_ids=self.stop_ids.tolist(),
            ignore_eos=True,  # the stop tokens say all
            detokenize=False,
        )

    def _push_weights(self) -> None:
        self._engine.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": list(whole_weights(self._model))}
        )
        if self._model.device.type == "cpu":
            self._engine.apply_model(_pack_head)
        self._engine.reset_prefix_cache()  # it holds keys of the weights before


def expect_several() -> None:
    """More than one model writes in this process: from now on ``engine: auto`` is transformers.

    An engine that was started keeps its share of the card until the process ends, though nobody
    needs it any more (vLLM's issue 21073), and the next one finds less.
    """
    VLLMEngine.alone = False


def lacking_here() -> str | None:
    """Why ``engine: auto`` isn't vLLM in this process; None where it is."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not VLLMEngine.alone:
        return "other models write in this process, and vLLM leaves them no room on the card"
    return None if importlib.util.find_spec("vllm") else "vLLM is not installed"


def whole_weights(model: LanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    """By the names of a model without adapters, LoRA's update added, the shared rows alone."""
    module: Any = model.module
    tables = {id(module.get_input_embeddings().weight)}
    tables |= {id(p) for p in module.get_output_embeddings().parameters()}
    adapted = {
        f"{place}.base_layer.weight": layer
        for place, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    for name, tensor in module.named_parameters():
        if "lora_" in name:
            continue
        weight = tensor[: model.vocabulary].detach() if id(tensor) in tables else tensor.detach()
        if name in adapted:
            layer: Any = adapted[name]
            weight = weight + layer.get_delta_weight("default").detach()
        yield name.replace(".base_layer.", "."), weight.to(model.dtype)


def _pack_head(module: Any) -> None:
    """On a CPU vLLM multiplies by packed copies, and a reload leaves a tied head's as it was."""
    layers: Any = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding")
    for layer in module.modules():
        if isinstance(layer, layers.ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


@dataclass
class _Row:
    """A request in vLLM's batch."""

    choose: TokenSampler
    uniforms: torch.Tensor
    request: list[int]
    response: list[int]  # vLLM's own list, which grows


def _chosen_tokens() -> type:
    """Forces vLLM's argmax to the token that we sampled."""
    processors: Any = importlib.import_module("vllm.v1.sample.logits_processor")
    follow_batch = processors.builtin.process_dict_updates

    class ChosenTokens(processors.LogitsProcessor):
        def __init__(self, config: Any, device: torch.device, is_pin_memory: bool):
            self._device = device
            self._rows: dict[int, _Row] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            follow_batch(self._rows, batch_update, _row)

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            rows = [self._rows[index] for index in range(len(logits))]
            choose, history = rows[0].choose, None  # one call of write, one decoding
            if choose.reads_history:
                texts = [(*row.request, *row.response) for row in rows]
                history = histories(texts, self._device)
            numbers = torch.stack([row.uniforms[len(row.response)] for row in rows])
            chosen = choose(logits, numbers.to(logits.device), history)
            return logits.scatter_(1, chosen[:, None], torch.inf)

    return ChosenTokens


def _row(parameters: Any, request: list[int] | None, response: list[int]) -> _Row | None:
    if not parameters.extra_args:  # vLLM tries itself out before it starts
        return None
    return _Row(**parameters.extra_args, request=request or [], response=response)


def _import_vllm() -> Any:
    """vLLM, told to stay within this process.

    Raises:
        UserError: if it isn't installed.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are pushed within the process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_CACHE_GIB))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        return importlib.import_module("vllm")
    except ImportError:
        raise UserError(
            "sampling.engine is vllm, which is not installed. "
            "Run: pip install 'promptkd[vllm]' (on a CPU as docs/quickstart.md says), "
            "or use sampling.engine=transformers."
        ) from None


@contextmanager
def _own_threads_back() -> Iterator[None]:
    """Undo what vLLM does to the process: its thread count and the cores it may use.

    On CPUs it also replaces ``torch.set_num_threads`` by a function that does nothing.
    """
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)
