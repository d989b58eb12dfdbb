"""The state of a training outside the model, kept and restored: optimiser, schedulers, plugins, random numbers."""

from __future__ import annotations

import itertools
import logging
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from flair.distributed_utils import is_main_process
from flair.nn import Model
from flair.trainers import ModelTrainer
from flair.trainers.plugins.base import BasePlugin
from torch.optim.lr_scheduler import LRScheduler

from flair_peft.adapter import keys, traits
from flair_peft.codec.state_positions import class_name
from flair_peft.errors import TrainingSetupError, UnsupportedStateError, name_some
from flair_peft.primitives import fingerprint, host_internals
from flair_peft.training import exact_steps
from flair_peft.training.plugins import RankAllocationPlugin

log = logging.getLogger("flair_peft")

State = dict[str, Any]

FOLLOWS_OLD = "those that it had"

# What plugins count while they train and no state dict holds.
_COUNTED: Mapping[type[BasePlugin], tuple[str, ...]] = {RankAllocationPlugin: ("_step",)}


def optimizer_state(optimizer: torch.optim.Optimizer, model: Model) -> State:
    """Return the state by the names of parameters; those of the frozen base have none and are left out.

    Raises:
        UnsupportedStateError: the optimiser keeps more than that.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _refuse_more(optimizer, names)
    groups = _named_groups(optimizer, names)
    parameters = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    kept = [name for group in groups for name in group["parameters"]]
    return {
        "class": class_name(optimizer),
        "defaults": plain(optimizer.defaults, "the optimiser"),
        "groups": groups,
        "parameters": {
            name: {
                "shape": list(parameters[name].shape),
                "dtype": str(parameters[name].dtype),
                "requires_grad": parameters[name].requires_grad,
            }
            for name in kept
        },
        "state": {
            name: plain(optimizer.state[parameters[name]], f"the optimiser's state of '{name}'")
            for name in kept
            if parameters[name] in optimizer.state
        },
        "exact": {
            names[id(parameter)]: plain(exact, "the optimiser's sums")
            for parameter, exact in exact_steps.sums_of(optimizer).items()
        },
    }


def _refuse_more(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
    """Return if all that the optimiser keeps belongs to parameters of the model: no more can be given back."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    more = {
        "parameters that are not the model's": sum(id(parameter) not in names for parameter in parameters),
        "entries of its state that belong to none of them": sum(id(key) not in names for key in optimizer.state),
        "parts that other optimisers do not have": len({*optimizer.state_dict()} - {"state", "param_groups"}),
    }
    found = [f"{count} {what}" for what, count in more.items() if count]
    if found:
        raise UnsupportedStateError(
            f"Cannot keep the state of the optimiser {class_name(optimizer)}: it has {' and '.join(found)}. A training "
            "that goes on would lose that. Train without save_optimizer_state=True, or with another optimiser."
        )


def _named_groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[State]:
    """Return names and settings of each group; AdaMSS freezes parameters in the middle of a training."""
    return [
        {
            "parameters": [
                names[id(p)]
                for p in group["params"]
                if p.requires_grad or p in optimizer.state or keys.is_adapter_key(names[id(p)])
            ],
            "settings": plain({key: value for key, value in group.items() if key != "params"}, "the optimiser"),
        }
        for group in optimizer.param_groups
    ]


def restore_optimizer_(optimizer: torch.optim.Optimizer, model: Model, state: State, source: str) -> None:
    """Give the optimiser the state of the one before, in place, whatever the order of the parameters.

    Raises:
        TrainingSetupError: it is of another class, or the parameters or their groups are not the same.
    """
    if class_name(optimizer) != state["class"]:
        raise _unfit(source, f"it was trained with {state['class']}, not {class_name(optimizer)}", "that optimiser")
    parameters = dict(model.named_parameters())
    _check_parameters(parameters, _named_groups(optimizer, {id(p): n for n, p in parameters.items()}), state, source)
    now = plain(optimizer.defaults, "the optimiser")
    warn_of_changes(now, state["defaults"], source=source, wins=FOLLOWS_OLD)
    for name, stored in state["parameters"].items():
        parameters[name].requires_grad_(stored["requires_grad"])
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    places = {identity: place for place, identity in enumerate(order)}
    ends = itertools.accumulate(len(group["params"]) for group in optimizer.param_groups)
    groups = [
        {**stored["settings"], "params": list(range(end - len(group["params"]), end))}
        for group, stored, end in zip(optimizer.param_groups, state["groups"], ends, strict=True)
    ]
    entries = state["state"]
    optimizer.load_state_dict(
        {"state": {places[id(parameters[n])]: entry for n, entry in entries.items()}, "param_groups": groups}
    )
    for name, entry in entries.items():
        if str(parameters[name].dtype) == state["parameters"][name]["dtype"]:
            _undo_casts_(optimizer.state[parameters[name]], entry)
    exact = {parameters[name]: tensor for name, tensor in state.get("exact", {}).items() if name in parameters}
    exact_steps.sums_of(optimizer).update({p: tensor.to(p.device) for p, tensor in exact.items()})


def learned(state: State, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, str]]:
    """Return dtype and digest of what the optimiser of a state trained, by the names of parameters in a file."""
    found = {name: tensors[name] for name in state["parameters"] if name in tensors}
    return {name: (str(tensor.dtype), fingerprint.of_tensor(tensor)) for name, tensor in found.items()}


def refuse_other_weights(model: Model, expected: Mapping[str, tuple[str, str]], source: str) -> None:
    """Return if the model, in training mode, has learned what :func:`learned` found in the file.

    Raises:
        TrainingSetupError: it has not: it is new, or of another file.
    """
    parameters = dict(model.named_parameters())
    others = [
        name
        for name, (dtype, digest) in expected.items()
        if name in parameters
        and str(parameters[name].dtype) == dtype
        and fingerprint.of_tensor(parameters[name]) != digest
    ]
    if others:
        reason = f"{len(others)} of {len(expected)} parameters have other values than there, such as '{others[0]}'"
        raise _unfit(source, reason, "the model that is loaded from that very file")


def _undo_casts_(entry: dict[str, Any], stored: Mapping[str, Any]) -> None:
    """Give state tensors the dtype they had, in place: torch casts them to that of the parameter."""
    for key, value in stored.items():
        if isinstance(value, torch.Tensor) and value.dtype != entry[key].dtype:
            entry[key] = value.to(entry[key].device)


def _check_parameters(parameters: Mapping[str, torch.Tensor], groups: list[State], state: State, source: str) -> None:
    stored = state["parameters"]
    present = {name for group in groups for name in group["parameters"]}
    trained = {name for name in present if parameters[name].requires_grad}
    shapes = {name: list(parameters[name].shape) for name in present}
    problems = {
        "trained before but not now": [n for n in stored if stored[n]["requires_grad"] and n not in trained],
        "trained now but not before": [n for n in trained if n not in stored],
        "of another shape": [
            f"{name} ({shapes[name]} instead of {stored[name]['shape']})"
            for name in stored
            if name in shapes and shapes[name] != stored[name]["shape"]
        ],
    }
    differences = "; ".join(f"{what}: {name_some(names)}" for what, names in problems.items() if names)
    if differences:
        raise _unfit(source, f"the parameters differ. {differences}", "the model from the same file")
    if [set(group["parameters"]) for group in groups] != [set(group["parameters"]) for group in state["groups"]]:
        reason = f"its optimiser had {len(state['groups'])} groups of parameters, and this one has {len(groups)} others"
        raise _unfit(source, reason, "the same plugins (LoraPlusPlugin) and the same decoder_learning_rate")


def _unfit(source: str, reason: str, wanted: str) -> TrainingSetupError:
    return TrainingSetupError(
        f"Cannot go on with the training of '{source}': {reason}. The state of its optimiser would mean something "
        f"else here. Train with {wanted}, or leave out ResumePlugin to start anew."
    )


def plugin_states(plugins: Iterable[BasePlugin]) -> list[State]:
    """Return the state of each plugin that has one: counters, schedulers, or what its ``state_dict`` returns."""
    states: list[State] = []
    for plugin in plugins:
        try:
            state = _plugin_state(plugin)
        except UnsupportedStateError as error:
            log.warning("%s starts anew if this training is resumed. %s", class_name(plugin), error)
            continue
        if state:
            states.append({"class": class_name(plugin), "settings": _plugin_settings(plugin), **state})
    return states


def _plugin_state(plugin: BasePlugin) -> State:
    state: State = {}
    counted = next((names for kind, names in _COUNTED.items() if isinstance(plugin, kind)), ())
    if counted:
        state["counted"] = {name: getattr(plugin, name) for name in counted}
    for name, holder in _state_holders(plugin).items():
        state[name] = plain(holder.state_dict(), class_name(plugin))
    return state


def _state_holders(plugin: BasePlugin) -> dict[str, Any]:
    """Return the plugin itself and its schedulers, as far as they can give and take a state."""
    schedulers = {name: each for name, each in vars(plugin).items() if isinstance(each, LRScheduler)}
    candidates = {"plugin": plugin, "scheduler": getattr(plugin, "scheduler", None), **schedulers}
    return {
        name: holder
        for name, holder in candidates.items()
        if callable(getattr(holder, "state_dict", None)) and callable(getattr(holder, "load_state_dict", None))
    }


def _plugin_settings(plugin: BasePlugin) -> State:
    settings = {key: value for key, value in plugin.get_state().items() if key not in ("__cls__", "base_path")}
    return {key: value for key, value in settings.items() if isinstance(value, (bool, int, float, str, type(None)))}


def restore_plugins(present: Iterable[BasePlugin], states: list[State], source: str) -> None:
    """Give each plugin the state of the one of its class before; of several, in their order.

    Raises:
        TrainingSetupError: a plugin that had a state is missing.
    """
    plugins = defaultdict(list)
    for plugin in present:
        plugins[class_name(plugin)].append(plugin)
    wanted = [state["class"] for state in states]
    missing = {name for name in wanted if len(plugins[name]) < wanted.count(name)}
    if missing:
        raise TrainingSetupError(
            f"Cannot go on with the training of '{source}': it was trained with {name_some(missing)}, and this "
            "training has none. Learning rates or ranks would not follow their plan. Pass the same plugins, and call "
            "the same of train() and fine_tune()."
        )
    for state in reversed(states):
        plugin = plugins[state["class"]].pop()
        warn_of_changes(_plugin_settings(plugin), state["settings"], source=source, wins=FOLLOWS_OLD)
        for name, value in state.get("counted", {}).items():
            plugin.__dict__[name] = value
        for name, holder in _state_holders(plugin).items():
            if name in state:
                holder.load_state_dict(state[name])


def adapter_scores(model: Model) -> dict[str, State]:
    """Return name of a module → the importance of its ranks, where a method keeps it outside any state dict."""
    return {
        name: {key: plain(scores, key) for key, scores in by_key.items()}
        for name, by_key in _score_holders(model).items()
    }


def restore_adapter_scores_(model: Model, states: Mapping[str, State]) -> None:
    """Put back, in place, what :func:`adapter_scores` returned."""
    for name, by_key in _score_holders(model).items():
        for key, scores in by_key.items():
            scores.clear()
            scores.update(send_to_device(states.get(name, {}).get(key, {}), next(model.parameters()).device))
    drawing_ahead = {option.ahead for option in traits.OPTIONS if option.ahead}
    if any(type(module).__name__ in drawing_ahead for module in model.modules()):
        # Several draws of each weight's size, which would make the file many times as large as the adapter.
        log.warning("MonteCLoRA draws its noise ahead, and no file keeps it: the next losses differ by other noise.")


def _score_holders(model: Model) -> dict[str, dict[str, dict[str, Any]]]:
    """Return name of a module → name of an attribute → the dictionary in it."""
    holders: dict[str, dict[str, dict[str, Any]]] = {}
    keeping = [method for method in traits.METHODS.values() if method.scores]
    for name, module in model.named_modules():
        for method in keeping:
            holder = vars(module).get(method.scores_in) if method.scores_in else module
            scores = {key: vars(holder).get(key) for key in method.scores} if holder is not None else {}
            if scores and all(isinstance(each, dict) for each in scores.values()):
                holders[name] = scores
    return holders


def random_state() -> State:
    """Return the state of every generator that a training draws from; tensors are on the CPU."""
    version, internal, gauss = random.getstate()
    name, numbers, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": {"version": version, "internal": torch.tensor(internal), "gauss": gauss},
        "numpy": {
            "name": name,
            "numbers": torch.from_numpy(np.asarray(numbers).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }


def set_random_state(state: State) -> None:
    """Set every generator as it was; the processes of a training on several GPUs keep their own."""
    if is_main_process():
        take_random_state(state)


def take_random_state(state: State) -> None:
    """Set every generator of this process, whichever it is."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([tensor.cpu() for tensor in state["cuda"]])
        else:
            log.warning("Dropout will differ: the training ran on a machine with %s GPUs.", len(state["cuda"]))
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
    numbers = numpy["numbers"].cpu().numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], numbers, numpy["position"], numpy["has_gauss"], numpy["cached"]))


def find_scaler(trainer: ModelTrainer) -> torch.amp.GradScaler | None:
    """Return the gradient scaler of a training in progress."""
    scaler = host_internals.variable_of_caller("train_custom", trainer, "scaler")
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None


def plain(value: Any, where: str) -> Any:
    """Return a copy of a state that holds plain values and tensors on the CPU only.

    Raises:
        UnsupportedStateError: it holds something else.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        found = [plain(item, where) for item in value]
        return tuple(found) if type(value) is tuple else found
    if isinstance(value, Mapping) and all(isinstance(key, (int, str)) for key in value):
        return {key: plain(item, f"{where}: {key}") for key, item in value.items()}
    raise UnsupportedStateError(
        f"Cannot keep the state of {where}: it holds a {type(value).__name__}. Files hold tensors and plain values, so "
        "that no code runs from them. Train without save_optimizer_state=True."
    )


def warn_of_changes(now: Mapping[str, Any], before: Mapping[str, Any], *, source: str, wins: str) -> None:
    """Say which settings differ between the training before and this one, and which of the two it follows."""
    changed = [f"{n} was {before[n]}, is {now[n]} now" for n in now if n in before and now[n] != before[n]]
    if changed:
        log.warning(
            "The training of '%s' had other settings than are given now: %s. It goes on with %s.",
            source,
            "; ".join(changed),
            wins,
        )
