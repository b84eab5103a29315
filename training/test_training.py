"""An interrupted and resumed training gives bit for bit what an uninterrupted one gives. Runs in seconds:

    python training/test_training.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TINY = ("--vocab 300 --embedding 64 --layers 1 --heads 2 --kv-heads 1 --feed-forward 96 --context 32 --batch 2 --steps 6 "
        "--warmup 2 --ternary-from 0.5 --full-context-from 0.5 --no-compile").split()


def train(data: Path, out: Path, *more: str) -> dict:
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "--data", str(data), "--out", str(out), *TINY, *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return torch.load(out / "checkpoint.pt", weights_only=False)


def test_resume_is_exact() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        (data / "a.txt").write_text("The otter slid down the bank and into the river.\n" * 400)
        whole = train(data, Path(folder) / "whole")
        resumed_out = Path(folder) / "resumed"
        first = train(data, resumed_out, "--stop-after", "2")
        assert first["step"] == 2
        resumed = train(data, resumed_out)
        assert resumed["step"] == whole["step"] == 6
        for name, tensor in whole["model"].items():
            assert torch.equal(tensor, resumed["model"][name]), name
        assert not torch.equal(first["model"]["token_embd"], whole["model"]["token_embd"])


if __name__ == "__main__":
    test_resume_is_exact()
    print("1 passed, 0 failed")
