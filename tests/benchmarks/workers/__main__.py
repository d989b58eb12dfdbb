"""One side of the comparison: ``python -m tests.benchmarks.workers PEER FOLDER DEVICE``.

The library is imported, and one line of JSON says how long that took; then each line of JSON on the standard input is a
request that is answered by one. Whatever the library prints goes to the standard error.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.memory import peak, reset_peak, resident
from tests.benchmarks.workers.peer import Peer

LIBRARIES = (
    *("flair_peft", "flair", "sentence-transformers", "adapters", "peft", "transformers"),
    *("torch", "tokenizers", "safetensors"),
)
HEAD = re.compile(r"(^|\.)(decoder|heads|linear)\.|^(weight|bias)$")
"""Names of the parameters of heads: Flair's, those of adapters and of sentence-transformers, and a layer by itself."""

TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "added_tokens.json"}
)


class Session:
    """What one process does for its peer. Times are in seconds, sizes in bytes."""

    def __init__(self, peer: Peer, name: str, torch: Any) -> None:
        self.peer, self.torch = peer, torch
        self.own = peer.folder / name
        self.texts = json.loads((peer.folder / "texts.json").read_text(encoding="utf-8"))
        self.action: Callable[[], Any] = lambda: None
        self.is_on_gpu = peer.device != "cpu"
        torch.zeros(1, device=peer.device)  # what the device sets up once is no library's
        self.reset()
        self.before = peak()

    def timed(self, action: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds of an action with all that it started on the device, and its result."""
        start = time.perf_counter()
        result = action()
        if self.is_on_gpu:
            self.torch.cuda.synchronize()
        return time.perf_counter() - start, result

    def reset(self) -> None:
        """Let the peaks of :meth:`memory` start from now."""
        gc.collect()
        reset_peak()
        if self.is_on_gpu:
            self.torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, int]:
        """Return the peak of this process, beyond its imports as well, and that of the device."""
        found = {"peak": peak(), "beyond": peak() - self.before}
        return {**found, "device": self.torch.cuda.max_memory_allocated()} if self.is_on_gpu else found

    def make(self, count: int, check: list[int]) -> dict[str, Any]:
        """Write so many checkpoints and return what the models of some of them predict."""
        scores = {}
        for number in range(count):
            model = self.peer.build(number)
            for module in self.peer.modules(model):
                module.eval()
            if number in check:
                scores[number] = self.peer.scores(model, self.texts["prediction"]).tolist()
            self.peer.save(model, self.own / str(number))
        return {"scores": scores}

    def without_adapter(self, number: int) -> dict[str, Any]:
        """Return what base and head alone predict."""
        return {"scores": self.peer.scores_without_adapter(number, self.texts["prediction"]).tolist()}

    def save(self) -> dict[str, Any]:
        """Return the seconds of the first save in this process and of the next, and the bytes that were written."""
        path = self.own / "saved"
        shutil.rmtree(path, ignore_errors=True)
        model = self.peer.build(0)
        for module in self.peer.modules(model):
            module.eval()
        seconds = [self.timed(lambda: self.peer.save(model, path))[0] for _ in range(2)]
        files = [file for file in path.rglob("*") if file.is_file()]
        return {
            "first": seconds[0],
            "again": seconds[1],
            "bytes": sum(file.stat().st_size for file in files),
            "tokenizer": sum(file.stat().st_size for file in files if file.name in TOKENIZER_FILES),
            "files": {str(file.relative_to(path)): file.stat().st_size for file in sorted(files)},
        }

    def load(self, prove: bool) -> dict[str, Any]:
        """Return the seconds from a checkpoint to the scores of one text, the peak of this process, and the scores."""
        text = self.texts["prediction"][:1]

        def load_and_predict() -> Any:
            return self.peer.scores(self.peer.load(self.own / "0", prove=prove), text)

        seconds, scores = self.timed(load_and_predict)
        return {"seconds": seconds, **self.memory(), "scores": scores.tolist()}

    def start_training(self, check: bool) -> dict[str, Any]:
        """Make a loop over one batch; return its loss without dropout, and what a step of it changes if that is asked.

        The check copies the whole model: a process that is to be measured does not do it.
        """
        model = self.peer.build(0)
        modules = self.peer.modules(model)
        parameters = [pair for module in modules for pair in module.named_parameters()]
        trained = [parameter for _, parameter in parameters if parameter.requires_grad]
        optimizer = self.torch.optim.AdamW(trained, lr=5e-5)
        batch = self.peer.batch(self.texts["training"], [number % 2 for number in range(len(self.texts["training"]))])

        def step() -> None:
            optimizer.zero_grad()
            self.peer.loss(model, batch).backward()
            self.peer.forget(batch)
            self.torch.nn.utils.clip_grad_norm_(trained, 5.0)
            optimizer.step()

        for module in modules:
            module.eval()
        loss = float(self.peer.loss(model, batch).detach())
        self.peer.forget(batch)
        for module in modules:
            module.train()
        self.action = step
        changes = {"adapter": 0.0, "head": 0.0, "base": 0.0}
        if check:
            before = [parameter.detach().clone() for _, parameter in parameters]
            step()
            for (name, parameter), value in zip(parameters, before, strict=True):
                change = float((parameter.detach() - value).abs().max())
                kind = "adapter" if "lora" in name else "head" if HEAD.search(name) else "base"
                changes[kind] = max(changes[kind], change)
        self.reset()
        return {"loss": loss, "changes": changes, "trained": sum(parameter.numel() for parameter in trained)}

    def start_predicting(self) -> dict[str, Any]:
        """Load a model and return the scores of a batch."""
        model = self.peer.load(self.own / "0", prove=True)
        self.action = lambda: self.peer.scores(model, self.texts["prediction"])
        return {"scores": self.action().tolist()}

    def start_mixing(self, models: int, kept: int, mixed: bool) -> dict[str, Any]:
        """Load models onto one base, and return the scores of a batch that is for all of them in equal shares."""
        many = self.peer.open()
        texts = self.texts["prediction"]
        keys = [self.peer.add(many, self.own / str(number % kept), prove=True) for number in range(models)]
        parts = {key: texts[number::models] for number, key in enumerate(keys)}

        def grouped() -> list[Any]:
            return [self.peer.scores_of(many, key, part) for key, part in parts.items()]

        self.action = (lambda: self.peer.scores_of_mixed(many, parts)) if mixed else grouped
        return {"scores": [scores.tolist() for scores in self.action()]}

    def act(self) -> dict[str, float]:
        """Return the seconds of what was started."""
        return {"seconds": self.timed(self.action)[0]}

    def many(self, models: int, kept: int, prove: bool) -> dict[str, Any]:
        """Return the memory with one model and with all, once each has predicted, and the seconds of each addition.

        The scores are those that the first and the last one give when all are there.
        """
        many = self.peer.open()
        texts = self.texts["prediction"]
        keys, seconds, sizes = [], [], []
        for number in range(models):
            taken, key = self.timed(
                lambda number=number: self.peer.add(many, self.own / str(number % kept), prove=prove)
            )
            keys.append(key)
            seconds.append(taken)
            self.peer.scores_of(many, key, texts)
            gc.collect()
            sizes.append(resident())
        memory = self.memory()
        scores = [self.peer.scores_of(many, key, texts).tolist() for key in (keys[0], keys[-1])]
        return {"one": sizes[0], "all": sizes[-1], "seconds": seconds[1:], "scores": scores, **memory}


def installed() -> dict[str, str]:
    """Return the versions of what matters here, where it is installed."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if "flair_peft" in sys.modules:  # of the tree that is measured, whether or not it is installed
        found["flair_peft"] = sys.modules["flair_peft"].__version__
    else:
        found.pop("flair_peft", None)
    return found


def main(name: str, folder: Path, device: str) -> None:
    """Import the peer, say so, and answer until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    module = importlib.import_module(f"tests.benchmarks.workers.{name}")
    taken = time.perf_counter() - start
    torch = sys.modules["torch"]
    logging.disable(logging.WARNING)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    answer({"import": taken, "versions": installed(), "gpu": gpu, "threads": torch.get_num_threads()})
    session = Session(module.PEER(folder, device), name, torch)
    for line in sys.stdin:
        request = json.loads(line)
        answer(getattr(session, request.pop("do"))(**request))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
