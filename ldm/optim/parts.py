"""Parts of a model that train: which parameters, in which steps, and at which learning rate."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ldm.modules.name_patterns import matches
from ldm.util import UserError, check_number, check_params, nearest, refuse_if

log = logging.getLogger(__name__)

KEY = "trained_parts"  # of the config, and of the digest in a checkpoint
_IS_FROZEN = "names frozen parameters only; see train_only, freeze, unet_trainable and cond_stage_trainable"


class TrainedParts:
    """Choice of the trained parameters and of their learning rates, by patterns of parameter names.

    Patterns are as in `ldm.modules.name_patterns`. A parameter that does not train has no gradient and no optimizer
    state.

    Args:
        train_only: patterns of the parameters to train; null for all that can train.
        freeze: patterns of parameters that do not train.
        rate_factors: factors of the learning rate by pattern. The last pattern that matches takes precedence.
        from_step: number of steps by pattern, after which its parameters train.
        until_step: number of steps by pattern, after which its parameters stay as they are.

    Raises:
        UserError: a pattern or a number is not valid.
    """

    def __init__(
        self,
        train_only: Sequence[str] | None = None,
        freeze: Sequence[str] | None = None,
        rate_factors: Mapping[str, Any] | None = None,
        from_step: Mapping[str, Any] | None = None,
        until_step: Mapping[str, Any] | None = None,
    ) -> None:
        self.train_only, self.frozen = train_only, freeze or ()
        self.rate_factors, self.from_step, self.until_step = map(_given, (rate_factors, from_step, until_step))
        for pattern, factor in self.rate_factors.items():
            check_number(f"{KEY}.rate_factors.{pattern}", factor, above=0, whole=False)
        for key, steps in (("from_step", self.from_step), ("until_step", self.until_step)):
            for pattern, step in steps.items():
                check_number(f"{KEY}.{key}.{pattern}", step, least=1)
        for pattern in (*(train_only or ()), *self.frozen, *self._settings()):
            refuse_if(
                not isinstance(pattern, str) or not all(pattern.split(".")),
                f"{KEY}: {pattern!r}: give parts of a parameter's name, such as attn2 or input_blocks.1",
            )
        self._spans: dict[str, range] = {}  # steps in which a parameter trains, if these are not all
        self._can_train: list[str] = []  # without this choice
        self._digest: str | None = None
        self._timed: list[tuple[nn.Parameter, range]] | None = None

    def _settings(self) -> list[str]:
        """Return the patterns with a setting of parameters that train."""
        return [*self.rate_factors, *self.from_step, *self.until_step]

    @property
    def choose(self) -> bool:
        """True if any setting is given."""
        return self.train_only is not None or bool(self.frozen) or bool(self._settings())

    @property
    def change_by_step(self) -> bool:
        """True if some parameters train in a part of the steps only."""
        return bool(self.from_step or self.until_step)

    def freeze(self, module: nn.Module) -> None:
        """Turn gradients off for the parameters of `module` that do not train. `module` has `trained_parameters`.

        Raises:
            UserError: a pattern matches no parameter that can train, or nothing trains in some step.
        """
        if not self.choose:
            return
        self._can_train = can_train = _names_of(module)
        self._check([*(self.train_only or ()), *self.frozen], can_train, module)
        parameters = dict(module.named_parameters())
        for name in can_train:
            is_chosen = self.train_only is None or _any_matches(self.train_only, name)
            parameters[name].requires_grad_(is_chosen and not _any_matches(self.frozen, name))
        trained = _names_of(module)
        refuse_if(not trained, f"{KEY}: train_only and freeze leave nothing to train; change one of them")
        self._check(self._settings(), trained, module)
        self._spans = {name: span for name in trained if (span := self._span(name)) is not None}
        self._check_each_step(trained)
        self._digest = _digest(self._groups(trained))

    def _check(self, patterns: Iterable[str], names: Sequence[str], module: nn.Module) -> None:
        for pattern in patterns:
            if any(matches(pattern, name) for name in names):
                continue
            refuse_if(
                any(matches(pattern, name) for name, _ in module.named_parameters()), f"{KEY}: {pattern!r} {_IS_FROZEN}"
            )
            valid = {part for name in names for part in name.split(".") if not part.isdigit()}
            raise UserError(f"{KEY}: {pattern!r} matches no parameter{nearest(pattern, valid)}")

    def _span(self, name: str) -> range | None:
        first, last = (_last_match(steps, name, None) for steps in (self.from_step, self.until_step))
        refuse_if(
            None not in (first, last) and first >= last,
            f"{KEY}: {name} would train from step {first} until step {last}; give a later until_step",
        )
        return None if first is last is None else range(first or 0, last or sys.maxsize)

    def _check_each_step(self, trained: Sequence[str]) -> None:
        for step in (0, *self.from_step.values(), *self.until_step.values()):
            refuse_if(
                not any(step in self._spans.get(name, (step,)) for name in trained),
                f"{KEY}: from_step and until_step leave nothing to train after {step} steps",
            )

    def rates(self, module: nn.Module) -> dict[nn.Parameter, float]:
        """Return the factor of the learning rate of each parameter that has one other than 1."""
        factors = {p: _last_match(self.rate_factors, name, 1.0) for name, p in module.named_parameters()}
        return {parameter: float(factor) for parameter, factor in factors.items() if factor != 1}

    def set_step(self, module: nn.Module, step: int) -> None:
        """Turn gradients on and off for the optimizer step after `step` steps."""
        if self._timed is None:
            self._timed = [(module.get_parameter(name), span) for name, span in self._spans.items()]
        for parameter, span in self._timed:
            parameter.requires_grad_(step in span)

    def log(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Log the numbers of trained parameters, with the learning rates of `optimizer`."""
        if self._digest is None:
            return
        parameters = dict(module.named_parameters())
        rates = [
            f"{_count(group['params']):,} at learning rate {float(group.get('initial_lr', group['lr'])):.3e}"
            for group in optimizer.param_groups
        ]
        trained = sum(_count(group["params"]) for group in optimizer.param_groups)
        total, timed = (_count(parameters[name] for name in names) for names in (self._can_train, self._spans))
        ending = f"; {timed:,} of them in a part of the steps" if timed else ""
        log.info("Training %s of %s parameters: %s%s", f"{trained:,}", f"{total:,}", ", ".join(rates), ending)

    # Checkpoints. An optimizer's state has numbers in place of names.

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add the digest of the trained parameters' names, in the optimizer's order, to a checkpoint."""
        if self._digest is not None:
            checkpoint[KEY] = self._digest

    def check(self, checkpoint: Mapping[str, Any], module: nn.Module) -> None:
        """Raise `UserError` if the optimizer state of `checkpoint` is that of other parameters than trained here."""
        saved = checkpoint.get(KEY)
        if not checkpoint.get("optimizer_states") or (saved is None and self._digest is None):
            return
        whole = _digest([self._can_train or _names_of(module)])
        refuse_if(
            (self._digest or whole) != (saved if isinstance(saved, str) else whole),
            f"the checkpoint's optimizer trained other parts; keep model.params.{KEY} of its run, or start a new "
            "run from its weights with model.params.ckpt_path",
        )

    def _groups(self, names: Iterable[str]) -> list[list[str]]:
        """Return `names` in groups of equal factors, as in the optimizer."""
        groups: dict[float, list[str]] = {}
        for name in names:
            groups.setdefault(_last_match(self.rate_factors, name, 1.0), []).append(name)
        return list(groups.values())


def parts_of(config: Mapping[str, Any] | None) -> TrainedParts:
    """Return the parts that the section `trained_parts` describes; all, if it is None.

    Raises:
        UserError: the section is not valid.
    """
    check_params(f"model.params.{KEY}", TrainedParts, config or {})
    return TrainedParts(**(config or {}))


def _given(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings that are not null."""
    return {pattern: value for pattern, value in (settings or {}).items() if value is not None}


def _any_matches(patterns: Iterable[str], name: str) -> bool:
    return any(matches(pattern, name) for pattern in patterns)


def _last_match(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the setting of the last pattern that matches `name`, or `default`."""
    return next((value for pattern, value in reversed(settings.items()) if matches(pattern, name)), default)


def _names_of(module: Any) -> list[str]:
    """Return the names of the parameters that `module` trains, in the optimizer's order."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [names[parameter] for parameter in module.trained_parameters()]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _digest(groups: Sequence[Sequence[str]]) -> str:
    return hashlib.sha256(json.dumps(groups).encode()).hexdigest()
