"""``serve``: many models behind one address."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flair_peft.cli.command import OK, TROUBLE, add_command, add_load
from flair_peft.cli.terminal import echo, printable, some
from flair_peft.errors import AdapterConfigError, ModelFileError
from flair_peft.primitives import progress
from flair_peft.storage import file_names

_NAMED = re.compile(r"([\w.-]+)=(.+)")
_TOKEN, _ADMIN_TOKEN = "FLAIR_PEFT_TOKEN", "FLAIR_PEFT_ADMIN_TOKEN"


def add_serve(commands: Any, name: str) -> None:
    """Add the command ``serve``."""
    text = "answer requests over HTTP with many models: those on one base share it, and one batch"
    parser = add_command(commands, name, _serve, text, "flair-peft serve ner=my-tagger sentiment=best-model.pt")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="directory, .pt file or Hub id; name=… names it")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; others than this machine's need a token"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    text = "milliseconds that a request waits for others, if some are expected (20)"
    parser.add_argument("--max-wait", type=float, default=20.0, metavar="MS", help=text)
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="sentences in one forward pass (32)")
    parser.add_argument("--batch-tokens", type=int, metavar="N", help="words in one forward pass")
    parser.add_argument("--queue", type=int, default=1024, metavar="N", help="sentences that may wait (1024)")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch")
    parser.add_argument("--dtype", help="of all bases, such as bfloat16")
    parser.add_argument("--adapter-memory", metavar="SIZE", help="that all adapters may take, such as 500MB")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the base: for a single model")
    text = f"file with the token that requests need; or {_TOKEN} in the environment"
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=text)
    text = f"file with the token that loads and unloads models; or {_ADMIN_TOKEN} in the environment"
    parser.add_argument("--admin-token-file", type=Path, metavar="FILE", help=text)
    text = "origin of pages elsewhere that may ask, such as https://example.org; may be repeated"
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help=text)
    add_load(parser)


def _serve(chosen: argparse.Namespace) -> int:
    models = _named(chosen.models)
    token = _token(chosen.token_file, _TOKEN)
    admin_token = _token(chosen.admin_token_file, _ADMIN_TOKEN)
    _refuse_open_address(chosen.host, token)
    if not 0 <= chosen.port <= 65535:
        raise AdapterConfigError(
            f"Cannot listen at port {chosen.port}: ports go from 0 to 65535. Nothing could reach the service. Pass "
            "--port with one of these; 0 takes one that is free."
        )
    if chosen.merge and len(models) > 1:
        raise AdapterConfigError(
            f"Cannot merge {len(models)} models that are served together: each would have a base of its own, and they "
            "could share neither memory nor batches. Leave out --merge, or serve one model."
        )
    from flair_peft.serving import create_app
    from flair_peft.serving.http.server import DrainingServer, reserve

    _set_threads(chosen.threads)
    with reserve(chosen.host, chosen.port) as at:
        with progress.shown("loading"):
            app = create_app(
                models,
                base_model=chosen.base_model,
                trust_remote_code=chosen.trust_remote_code,
                dtype=chosen.dtype,
                adapter_memory=chosen.adapter_memory,
                merge=chosen.merge,
                max_wait=chosen.max_wait / 1000,
                batch=chosen.batch,
                batch_tokens=chosen.batch_tokens,
                queue=chosen.queue,
                token=token,
                admin_token=admin_token,
                cors=chosen.cors,
            )
        served = [model.to_info() for model in app.state.service.models.all]
        names = some([printable(model["name"]) for model in served], 10)
        bases = some(sorted({printable(model["base"]) for model in served if model["adapter"]}), 3)
        on_bases = f" on {bases}" if bases else ""

        def tell(address: str) -> None:
            echo(f"{address} answers with {names}{on_bases}.")
            sys.stdout.flush()  # whoever started it may read a pipe

        server = DrainingServer(app, at, started=tell)
        server.run()
    return OK if server.started else TROUBLE


def _named(given: Sequence[str]) -> dict[str, str]:
    """Return name → model: the name that is given, or that of the file, the directory or the repository."""
    found: dict[str, str] = {}
    for text in given:
        file_names.refuse_impossible(text)
        match = None if Path(text).exists() else _NAMED.fullmatch(text)
        name, source = match.groups() if match else (Path(text).absolute().name.removesuffix(".pt"), text)
        if name in found:
            raise AdapterConfigError(
                f"Cannot serve two models as '{name}': requests tell models by their names. These are "
                f"'{found[name]}' and '{source}'. Name one of them: other={source}."
            )
        found[name] = source
    return found


def _token(path: Path | None, variable: str) -> str | None:
    """Return the token in a file or the environment; ``None`` if there is none."""
    if path is None:
        return os.getenv(variable, "").strip() or None
    try:
        found = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(
            f"Cannot read the token in '{path}': {type(error).__name__}. Without it the server would be open to "
            "everyone. Check the path."
        ) from error
    if not found:
        raise ModelFileError(
            f"Cannot use the token in '{path}': the file is empty. The server would be open to everyone. Write one "
            "into it: openssl rand -hex 32."
        )
    return found


def _refuse_open_address(host: str, token: str | None) -> None:
    """Return if only this machine can ask, or whoever asks needs a token."""
    try:
        is_own = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_own = host == "localhost"
    if not is_own and token is None:
        raise AdapterConfigError(
            f"Cannot listen at {host} without a token: other machines could ask there, and nothing would tell who may. "
            f"Only this machine's own addresses need none. Pass --token-file, or set {_TOKEN}."
        )


def _set_threads(count: int | None) -> None:
    if count is None:
        return
    if count < 1:
        raise AdapterConfigError(
            f"Cannot compute in {count} threads. It is the number that one forward pass uses. Pass 1 or more."
        )
    import torch

    torch.set_num_threads(count)
