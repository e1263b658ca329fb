"""Vision towers as functions of images: what a model reads of their outputs, and how to replace these outputs.

A tower returns more than a model reads: LLaVA takes one of CLIP's hidden states. Which tensors are read is found from one forward
pass, because the logits depend on them. A forward pass in which the towers return these tensors from elsewhere computes the same,
and runs no layer of a tower. No class of transformers is changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from mmtune.families.structure import find_components, image_features_of
from mmtune.models.fake_tensors import TreeSpec, tree_flatten, tree_unflatten
from mmtune.models.processors.feature_counter import leaves_of
from mmtune.utils.errors import UserError


@dataclass(frozen=True)
class _Output:
    """The output of one tower as nested values, its tensors empty, and the numbers of those that the model reads."""

    structure: TreeSpec
    values: list[Any]
    used: list[int]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Any:
        """An output with the tensors that the model reads; the others stay empty."""
        values = list(self.values)
        for index, tensor in zip(self.used, tensors, strict=True):
            values[index] = tensor
        return tree_unflatten(values, self.structure)


class VisionTowers:
    """The vision towers of a model.

    Args:
        model: plain or with an adapter, without the wrappers of a distributed run.

    Raises:
        UserError: the model has no vision tower, or no function of its image features.
    """

    def __init__(self, model: nn.Module) -> None:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.paths = find_components(base).towers
        self._image_features = image_features_of(base)
        if not self.paths or self._image_features is None:
            raise UserError(f"{type(base).__name__} has no vision tower whose features can be computed alone")
        self.modules: list[nn.Module] = [base.get_submodule(path) for path in self.paths]
        self._outputs: list[_Output] = []

    def find_outputs(self, run: Callable[[], torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Find the tensors of the towers' outputs on which a result depends. Tensors without a gradient count as well.

        Args:
            run: a forward pass with images, which calls every tower once.

        Returns:
            These tensors, in the order of `features`; and the result of `run`.

        Raises:
            UserError: a tower is not called, is called several times, or the result does not depend on its output.
        """
        outputs: list[list[tuple[list[Any], TreeSpec]]] = [[] for _ in self.modules]

        def record(number: int, _: nn.Module, __: Any, output: Any) -> Any:
            values, structure = tree_flatten(output)
            values = [value.detach().requires_grad_() if _is_floating(value) else value for value in values]
            outputs[number].append((values, structure))
            # Copies: some models scale the output in place.
            return tree_unflatten([value.clone() if _is_floating(value) else value for value in values], structure)

        with torch.enable_grad(), self._hooked(record):
            result = run()
        reached = leaves_of([result])
        self._outputs, tensors = [], []
        for path, calls in zip(self.paths, outputs, strict=True):
            if len(calls) != 1:
                raise UserError(f"expected one call of {path} in a forward pass, got {len(calls)}")
            values, structure = calls[0]
            read = [index for index, value in enumerate(values) if _is_floating(value) and id(value) in reached]
            if not read:
                raise UserError(f"the logits do not depend on the output of {path}")
            others = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor) and not _is_floating(value)]
            used = sorted(read + others)
            empty = [value.detach().new_empty(0) if isinstance(value, torch.Tensor) else value for value in values]
            self._outputs.append(_Output(structure, empty, used))
            tensors += [values[index].detach() for index in used]
        return tensors, result.detach()

    def features(self, media: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of the towers' outputs that the model reads, for the images of one sample. No gradient is computed.

        Args:
            media: the sample's tensors, as its encoding has them; other tensors are not used.
        """
        assert self._image_features is not None
        tensors: list[list[torch.Tensor]] = [[] for _ in self.modules]

        def record(number: int, _: nn.Module, __: Any, output: Any) -> None:
            values = tree_flatten(output)[0]
            tensors[number] = [values[index].clone() for index in self._outputs[number].used]

        taken = inspect.signature(self._image_features).parameters
        with torch.no_grad(), self._hooked(record):
            self._image_features(**{name: value for name, value in media.items() if name in taken}, return_dict=True)
        return [tensor for each in tensors for tensor in each]

    @contextlib.contextmanager
    def replaced(self, features: Sequence[torch.Tensor]) -> Iterator[None]:
        """Inside, the towers return these tensors, in the order of `features`, whatever their inputs."""
        rest = list(features)
        with contextlib.ExitStack() as stack:
            for tower, output in zip(self.modules, self._outputs, strict=True):
                own, rest = rest[: len(output.used)], rest[len(output.used) :]
                stack.enter_context(_forward_returns(tower, output.with_tensors(own)))
            yield

    def trained(self) -> list[str]:
        """The names of the parameters inside the towers that train."""
        towers = zip(self.paths, self.modules, strict=True)
        return [f"{path}.{name}" for path, tower in towers for name, p in tower.named_parameters() if p.requires_grad]

    def digest(self) -> str:
        """A digest of what determines the features of processed images: class, config and weights, and which tensors are read."""
        described = []
        for tower, output in zip(self.modules, self._outputs, strict=True):
            config: Any = getattr(tower, "config", None)
            described.append((type(tower).__name__, config and config.to_json_string(use_diff=False), output.used))
        return hashlib.sha256(repr([described, self.weights_digest()]).encode()).hexdigest()

    def weights_digest(self) -> str:
        """A digest of the weights and buffers of the towers, with their names, shapes and dtypes."""
        tensors = [item for tower in self.modules for item in sorted(tower.state_dict().items())]
        with ThreadPoolExecutor(max_workers=8) as threads:
            digests = list(threads.map(_tensor_digest, (tensor for _, tensor in tensors)))
        named = [(name, digest) for (name, _), digest in zip(tensors, digests, strict=True)]
        return hashlib.sha256(repr(named).encode()).hexdigest()

    @contextlib.contextmanager
    def _hooked(self, record: Callable[[int, nn.Module, Any, Any], Any]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for number, tower in enumerate(self.modules):
                hook = tower.register_forward_hook(lambda *arguments, number=number: record(number, *arguments))
                stack.callback(hook.remove)
            yield


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _tensor_digest(tensor: torch.Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    data = plain.view(torch.uint8).numpy().data
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


@contextlib.contextmanager
def _forward_returns(module: nn.Module, output: Any) -> Iterator[None]:
    previous = module.__dict__.get("forward")  # set by wrappers of other libraries
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if previous is not None:
            module.forward = previous
