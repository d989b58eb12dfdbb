"""The models that are served, by name: on one shared base where they can, and with proof of what they are."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flair.nn import Model

from flair_peft.adapter import config as configs
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, adapted_embeddings
from flair_peft.errors import (
    AdapterConfigError,
    BaseMismatchError,
    BaseModelNotFoundError,
    FlairPeftError,
    ModelFileError,
    RequestError,
    name_some,
)
from flair_peft.export.merge import merge
from flair_peft.inspection import report
from flair_peft.inspection.adapters import Adapter
from flair_peft.models import load
from flair_peft.primitives import fingerprint
from flair_peft.primitives.dtypes import DtypeLike, parse_dtype
from flair_peft.serving.http import requests
from flair_peft.serving.http.answers import answer_of
from flair_peft.serving.http.model_forms import ModelForm, form_of
from flair_peft.serving.http.requests import Entity, Item
from flair_peft.serving.shared_base import SharedBase
from flair_peft.storage import file_names, hub, manifest

NONE = "none"
"""Stands for a digest or fingerprint of what a model does not have."""

_NAME = re.compile(r"[\w.-]{1,200}")

_PROOF = "Berlin is large."
_SHOWN_SETTINGS = ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora")


@dataclass(frozen=True, eq=False, kw_only=True)
class ServedModel:
    """One model that is served. A name may pass to another one; who asked before is answered by this one.

    Attributes:
        name: that requests call it by.
        model: Flair's.
        form: what it takes and gives.
        shared: the base that it shares with others, or ``None``.
        base: name of its base.
        base_fingerprint: digest of the base's weights, as checkpoints record it.
        digest: of the model: the hash that the checkpoint's ``flair_peft.json`` has of itself and with it of all its
            files, or that of the ``.pt`` file, or of the weights of a live model.
        adapter: method and settings, or ``None``.
    """

    name: str
    model: Model
    form: ModelForm
    shared: SharedBase | None = None
    base: str = NONE
    base_fingerprint: str = NONE
    digest: str = NONE
    adapter: dict[str, Any] | None = None

    @property
    def embeddings(self) -> list[PeftTransformerEmbeddings]:
        """Those that have an adapter."""
        return [each for each in adapted_embeddings(self.model) if each.has_adapter]

    def to_info(self) -> dict[str, Any]:
        """Return what users are told of it."""
        form = self.form
        found = {
            "name": self.name,
            "kind": form.kind,
            "class": type(self.model).__name__,
            "label_type": form.label_type,
            "labels": list(form.labels),
            "multi_label": form.is_multi_label,
            "takes": form.takes,
            "has_all_scores": form.has_all_scores,
            "base": self.base,
            "base_fingerprint": self.base_fingerprint,
            "adapter_digest": self.digest,
            "adapter": self.adapter,
        }
        tasks = {
            name: {"kind": task.kind, "label_type": task.label_type, "labels": list(task.labels)}
            for name, task in form.tasks.items()
        }
        return {**found, "tasks": tasks} if tasks else found

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the model computes on the base as it is."""
        with contextlib.ExitStack() as stack:
            for embeddings in self.embeddings:
                stack.enter_context(embeddings.in_use())
                stack.enter_context(embeddings.model.disable_adapter())
            yield


@dataclass(kw_only=True)
class ServedModels:
    """Loads models, gives them names, and lets those on one base share it.

    Attributes:
        options: of each load, as for :func:`flair_peft.from_pretrained`.
        dtype: of all bases; ``None`` leaves each model the one that it was trained on.
        adapter_memory: as for :class:`flair_peft.SharedBase`.
        is_merged: whether adapters are merged into a base of their own.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: DtypeLike | None = None
    adapter_memory: int | str | None = None
    is_merged: bool = False
    _by_name: dict[str, ServedModel] = field(default_factory=dict)
    _bases: dict[tuple[Any, ...], SharedBase] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.is_merged:
            return
        is_narrow = self.dtype is not None and parse_dtype(self.dtype) != torch.float32
        given = {"dtype": is_narrow, "adapter_memory": self.adapter_memory is not None}
        if any(given.values()):
            useless = name_some(name for name, is_given in given.items() if is_given)
            raise AdapterConfigError(
                f"Cannot merge the models to be served and use {useless}: a merged model is Flair's own, in float32, "
                f"and has no adapter beside its base. Leave out merge, or {useless}."
            )

    @property
    def all(self) -> list[ServedModel]:
        """The models, in the order of their names."""
        return [self._by_name[name] for name in sorted(self._by_name)]

    def get(self, names: Sequence[str]) -> list[ServedModel]:
        """Return the models of these names.

        Raises:
            RequestError: there is none of a name.
        """
        found = dict(self._by_name)
        unknown = [name for name in names if name not in found]
        if unknown:
            raise RequestError(
                f"Cannot find {name_some(unknown)} among the models that are served. These are "
                f"{name_some(found) or 'none'}, and nothing answers in the place of another. Ask for one of them.",
                status=404,
                code="unknown_model",
            )
        return [found[name] for name in names]

    def put(self, served: ServedModel) -> ServedModel | None:
        """Let the model have its name, and return the one that had it before."""
        before = self._by_name.get(served.name)
        self._by_name[served.name] = served
        return before

    def remove(self, name: str) -> ServedModel:
        """Take the name from its model, and return that.

        Raises:
            RequestError: there is none.
        """
        self.get([name])
        return self._by_name.pop(name)

    def release(self, served: ServedModel) -> None:
        """Free what a model holds that nobody asks any more; its base goes with the last model on it."""
        if served.shared is not None:
            served.shared.unload(served.model)
            self._forget_unused()

    def _forget_unused(self) -> None:
        in_use = {id(each.shared) for each in list(self._by_name.values())}
        self._bases = {key: base for key, base in self._bases.items() if id(base) in in_use}

    def find(self, source: Any, revision: str | None = None) -> Any:
        """Return where a model lies on this machine, downloaded if it is a checkpoint on the Hub; or the model itself.

        What is neither is left to Flair, which knows names of its own.
        """
        if not isinstance(source, (str, Path)):
            return source
        file_names.refuse_impossible(source)
        path = Path(source)
        if path.exists():
            hub.refuse_revision(str(source), revision)
            return path
        found = hub.find_for_flair(str(source), revision=revision, options=load.choose(**self.options))
        return found or (str(source) if revision is None else f"{source}@{revision}")

    def load(self, name: str, place: Any) -> ServedModel:
        """Return a model that has proven itself: its load did, and it predicts; it does not have the name yet.

        Not to be called while a model predicts: what loads models changes settings of the whole process.

        Raises:
            AdapterConfigError: it cannot be served.
            FlairPeftError: it cannot be loaded.
        """
        if not _NAME.fullmatch(name):
            raise AdapterConfigError(
                f"Cannot serve a model as {name!r:.100}: names stand in headers and addresses. They have letters, "
                "digits, points, dashes and underscores. Choose another one."
            )
        before = digest_of(place)
        try:
            model, shared = self._load(place)
            if before != digest_of(place):
                raise ModelFileError(
                    f"Cannot serve '{place}': it was replaced while it was loaded. It is not clear which of the two "
                    "was read. Load it again."
                )
            served = _describe(name, model, shared, before)
            model.eval()
            if self.is_merged and served.adapter is not None:
                served = _merged(served)
            prove(served)
        except Exception:  # it goes on, without a base that was made for it
            self._forget_unused()
            raise
        return served

    def _load(self, place: Any) -> tuple[Model, SharedBase | None]:
        if not isinstance(place, (str, Path)):
            return place, None
        found = report.inspect(place) if isinstance(place, Path) else None
        if found is None or not found.adapters:
            return _load_plain(place), None
        if not self.is_merged:
            try:
                if (shared := self._base_of(found.adapters[0])) is not None:
                    return shared.load(place, **self.options), shared
            except (BaseModelNotFoundError, BaseMismatchError):
                if self.dtype is not None or self.options.get("base_model"):
                    raise
                self._forget_unused()  # it holds a base of its own, or loading it says what is wrong
        return load.from_pretrained(place, **self.options), None

    def _base_of(self, adapter: Adapter) -> SharedBase | None:
        """Return the shared base of an adapter; ``None`` if it has to be loaded with one of its own."""
        record = adapter.base
        override = self.options.get("base_model")
        name = override if isinstance(override, str) else (override or {}).get(record.get("name"), record.get("name"))
        if not name or record.get("quantization") or not adapter.has_config:
            return None
        dtype = self.dtype if self.dtype is not None else record.get("dtype")
        revision = record.get("revision") if name == record.get("name") else None
        key = (name, revision, str(dtype))
        if key not in self._bases:
            options = {**load.choose(**self.options).arguments(), **({"revision": revision} if revision else {})}
            self._bases[key] = SharedBase(name, dtype=dtype, adapter_memory=self.adapter_memory, **options)
        return self._bases[key]


def _load_plain(place: Any) -> Model:
    try:
        return Model.load(place)
    except FlairPeftError:
        raise
    except Exception as error:  # Flair raises what it likes
        raise ModelFileError(
            f"Cannot load '{place}' ({type(error).__name__}): it is neither a checkpoint of flair_peft nor a model "
            "that Flair finds or reads by itself. Flair's log says what it tried. Check the path or the name."
        ) from error


def _describe(name: str, model: Model, shared: SharedBase | None, digest: str | None) -> ServedModel:
    form = form_of(model)
    embedded = [each for each in adapted_embeddings(model) if each.has_adapter]
    if not embedded:
        return ServedModel(name=name, model=model, form=form)
    record, config = embedded[0].base_record, configs.encode_config(embedded[0].adapter_config)
    settings = {key: config[key] for key in _SHOWN_SETTINGS if config.get(key)}
    return ServedModel(
        name=name,
        model=model,
        form=form,
        shared=shared,
        base=embedded[0].base_model_name if record is None else record.name,
        base_fingerprint=NONE if record is None or record.fingerprint is None else record.fingerprint,
        digest=digest or fingerprint.full(model.state_dict()),
        adapter={"method": config["peft_type"], **settings},
    )


def _merged(served: ServedModel) -> ServedModel:
    """Return a model whose adapter is merged: it says of itself what it was made of."""
    found = {key: getattr(served, key) for key in ("name", "form", "base", "base_fingerprint", "digest")}
    adapter = {**(served.adapter or {}), "merged": True}
    return ServedModel(**found, model=merge(served.model), adapter=adapter)


def digest_of(place: Any) -> str | None:
    """Return the hash of a checkpoint or a file; ``None`` for what is neither."""
    if not isinstance(place, Path):
        return None
    if place.is_dir():
        try:
            found = json.loads((place / manifest.DOCUMENT).read_bytes())["sha256"]
        except (OSError, ValueError, LookupError, TypeError):
            return None  # loading it says what is wrong
        return found if isinstance(found, str) else None
    return fingerprint.of_file(place)


def prove(served: ServedModel) -> None:
    """Return if the model predicts and what it says has a form.

    Raises:
        AdapterConfigError: it does not.
    """
    texts = {"pair": 2, "triple": 3}.get(served.form.takes, 1)
    item = Item(text=_PROOF) if texts == 1 else Item(texts=[_PROOF] * texts)
    if served.form.takes == "entities":
        kind = served.form.entity_types[0]
        ends = ((0, 6), (10, 15))
        item = Item(text=_PROOF, entities=[Entity(start=start, end=end, entity_group=kind) for start, end in ends])
    try:
        points = requests.points_of([item], served.form)
        served.model.predict(points)
        answer_of(points[0], item, served.form)
    except Exception as error:  # a model of anybody's, which is not served then
        raise AdapterConfigError(
            f"Cannot serve '{served.name}': it loads, but it does not predict for a plain text "
            f"({type(error).__name__}: {str(error)[:200]}). Nobody would get an answer from it. Try its predict in "
            "Python, and save it again."
        ) from error
