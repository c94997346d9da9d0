"""One recipe on several processes of one thread each, which are told when to take a step.

The models have random weights: what a step takes doesn't depend on them. They are written once.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from setting import MODELS
from transformers import AutoModelForCausalLM, LlamaConfig

from promptkd.distillation.demo import unpack_teacher
from promptkd.models.loading import load_tokenizer, save_model

STARTER = resources.files("promptkd") / "starter" / "train.jsonl"
ROWS = 49152
"""Of SmolLM2's token table, which both models read by."""


@dataclass(frozen=True)
class Pair:
    """Layers of student and teacher, and the width of both."""

    student: int
    teacher: int
    width: int

    def written(self) -> tuple[Path, Path]:
        """Their directories."""
        return self._model(self.student), self._model(self.teacher)

    def _model(self, layers: int) -> Path:
        directory = MODELS / f"random-{layers}x{self.width}"
        if not directory.exists():
            smol = MODELS / "teacher"
            if not smol.exists():
                unpack_teacher(smol)
            config = LlamaConfig(
                vocab_size=ROWS,
                hidden_size=self.width,
                intermediate_size=8 * self.width // 3,
                num_hidden_layers=layers,
                num_attention_heads=self.width // 64,
                num_key_value_heads=self.width // 192,
                tie_word_embeddings=True,
                bos_token_id=1,
                eos_token_id=2,
            )
            torch.manual_seed(layers)
            load_tokenizer(str(smol)).save_pretrained(directory)
            save_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), directory)
        return directory


def recipe(
    pair: Pair, output: Path, response_tokens: int = 64, **optimization: Any
) -> dict[str, Any]:
    """PromptKD on the student's own responses; they end by themselves hardly ever."""
    student, teacher = pair.written()
    return {
        "student": {"model": str(student)},
        "teacher": {"model": str(teacher)},
        "method": {"name": "promptkd"},
        "data": {
            "train": str(STARTER),
            "template": "chat",
            "max_request_tokens": 64,
            "max_response_tokens": response_tokens,
        },
        "optimization": {"max_steps": 1000, "learning_rate": 0.0} | optimization,
        "output": str(output),
    }


class OnRanks:
    """A script of this folder on ``number`` processes; each line that it reads is answered by one.

    Args:
        place: for its recipe.
        environment: more variables.
    """

    def __init__(
        self,
        script: str,
        given: dict[str, Any],
        number: int,
        *,
        place: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ):
        place.mkdir(parents=True, exist_ok=True)
        path = place / "recipe.yaml"
        path.write_text(yaml.safe_dump(given))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(number),
            "LOCAL_WORLD_SIZE": str(number),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PROMPTKD_PATIENCE": "600",
        }
        self._processes = [
            subprocess.Popen(
                [sys.executable, script, str(path)],
                env={**os.environ, **common, **environment}
                | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(number)
        ]

    def ask(self, line: str) -> list[dict[str, Any]]:
        """What each process answers; all have begun before any is waited for."""
        for process in self._processes:
            assert process.stdin
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return [self._answer(process) for process in self._processes]

    def end(self) -> None:
        for process in self._processes:
            process.kill()

    def _answer(self, process: "subprocess.Popen[str]") -> dict[str, Any]:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("{"):  # else what a run says
                return json.loads(line)
        raise SystemExit("a process ended early; what it said stands above")
