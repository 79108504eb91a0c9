"""Which rows of each parameter a rank keeps up to date, and how gradients and weights get there and back.

One law for every layout: a rank updates rows [begin, end) of a parameter's first dimension, all experts counted. So
an optimizer, a checkpoint or an average of weights needs no more than `Sharding.own` to work on its part.

FSDP2 (`dp_shard` above 1): blocks hold their rows between uses, and torch gathers and reduces them. What stays whole
between uses (everything if `dp_shard` is 1, routers always: they are small and FP32 whatever the rest is) has its
gradients summed once per step, each rank getting the sum of its rows, and the rows sent to all others once they are
updated: ZeRO-1. It asks nothing of forward and backward passes, so pipelines work over it as they are. Where they are
to hold rows between uses too, `dsv3.parallel.lending` stands in for FSDP2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dsv3.model.experts import DeepSeekMoE, Experts
from dsv3.model.router import Router
from dsv3.parallel.exchange import all_gather_flat
from dsv3.parallel.mesh import ALONE, Axis, Mesh
from dsv3.parallel.rows import gather_rows, reduce_rows, row_span


@dataclass(frozen=True)
class Part:
    """This rank's rows of one parameter."""

    shape: tuple[int, ...]  # of the whole parameter, all experts counted
    begin: int  # rows [begin, end) of the whole
    end: int
    replicas: Axis = ALONE  # ranks whose copies of the held rows are alike: they share the updating (ZeRO-1)
    shards: Axis = ALONE  # ranks that the held rows are divided among (FSDP2, lending)
    first: bool = True  # no other rank that updates the same rows speaks for them


class Sharding:
    """The parts of a model's parameters by name. `Sharding()` is one process that has everything."""

    def __init__(
        self, parts: Mapping[str, Part] | None = None, mesh: Mesh | None = None, model: nn.Module | None = None
    ) -> None:
        self._parts = dict(parts or {})
        self._mesh = Mesh() if mesh is None else mesh
        self._model = model

    def part(self, name: str, tensor: Tensor) -> Part:
        """The part of parameter `name`; the whole of `tensor` if nothing divides it."""
        return self._parts.get(name) or Part(tuple(tensor.shape), 0, tensor.shape[0])

    def known(self, name: str) -> Part | None:
        """The part of parameter `name`, if there is such a parameter."""
        return self._parts.get(name)

    def is_elsewhere(self, name: str) -> bool:
        """Whether other ranks have the parameter `name` of the model, and this one no row of it."""
        return False

    def written(self, held: Mapping[str, Tensor]) -> dict[str, range]:
        """Of parameters and buffers by name, `held` here in part or whole: the rows that this rank is to write down.

        All ranks together write everything once.
        """
        rows = {}
        for name, tensor in held.items():
            part = self.part(name, tensor)
            if part.first if name in self._parts else self._mesh.data.index == 0:
                rows[name] = range(part.begin, part.end)
        return rows

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's rows of the parameter `name` as the model holds it: a view, or `tensor` if all are its own."""
        if isinstance(tensor, DTensor):
            return tensor.to_local()
        replicas = self._parts[name].replicas if name in self._parts else ALONE
        return tensor if replicas.size == 1 else tensor.narrow(0, *row_span(tensor.shape[0], replicas))

    def whole(self, name: str, rows: Tensor) -> Tensor:
        """Own rows of parameter `name`, or of something of its shape, made whole. Not for the stacks of experts."""
        part = self.part(name, rows)
        held = row_span(part.shape[0], part.shards)[1]
        for axis, length in ((part.replicas, held), (part.shards, part.shape[0])):
            if axis.size > 1:
                padded = rows.new_zeros(row_span(length, axis, 0)[1], *rows.shape[1:])
                padded[: rows.shape[0]] = rows
                rows = all_gather_flat(padded.flatten(), axis).view(-1, *rows.shape[1:])[:length]
        return rows

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of the sharded model by name, each as it is between uses."""
        if isinstance(model, FSDPModule):
            model.reshard()  # what an evaluation left gathered
        return dict(model.named_parameters())

    def norm(self, parts: Mapping[str, Tensor], norm_of: Callable[[list[Tensor]], Tensor]) -> float:
        """The L2 norm of all ranks' tensors together; `norm_of` gives that of this rank's."""
        mine = [value for name, value in parts.items() if self.part(name, value).first]
        norm = float(norm_of(mine)) if mine else 0.0
        if self._mesh.world.group is None:
            return norm
        square = torch.full((), norm * norm, dtype=torch.float64, device=self._mesh.device)
        return math.sqrt(float(self._mesh.world.sum_(square)))

    def reduce(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Own rows of gradients that are as the model holds its parameters, summed over the replicas.

        Every rank of an axis must give the same names in the same order.
        """
        own = {name: self.own(name, gradient) for name, gradient in gradients.items()}
        return own | reduce_rows(gradients, self._replicas(gradients))

    @torch.no_grad()
    def publish(self, parameters: Mapping[str, Tensor]) -> None:
        """After own rows have changed: let every rank that uses them have them."""
        if isinstance(self._model, FSDPModule):
            self._model.reshard()  # what an evaluation left gathered is of the rows before
        own = {name: self.own(name, parameter) for name, parameter in parameters.items()}
        gather_rows(own, parameters, self._replicas(parameters))

    def _replicas(self, names: Iterable[str]) -> dict[str, Axis]:
        return {name: self._parts[name].replicas if name in self._parts else ALONE for name in names}


Divide = Callable[[nn.Module, Mesh, torch.dtype], set[str]]
"""(model, mesh, what it computes in) -> names of the parameters of which the model now holds this rank's rows only."""


def shard_parameters(model: nn.Module, mesh: Mesh, dtype: torch.dtype, divide: Divide | None = None) -> Sharding:
    """Divide a model's parameters, FP32 or wider and with its experts distributed, as `mesh` says, in place.

    dtype: what the model computes in. What is gathered is cast on the way; what stays whole keeps its dtype here,
    so that masters can be taken before `cast_whole`. divide: what has the rows gathered; None is FSDP2.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    sharded = (divide or _apply_fsdp)(model, mesh, dtype) if mesh.shard.size > 1 else set[str]()
    expert_names = {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters(recurse=False)
    }
    parts = {}
    for name, parameter in model.named_parameters():
        rows, is_expert = shapes[name][0], name in expert_names
        begin = mesh.ep.index * rows if is_expert else 0
        shape = (rows * mesh.ep.size if is_expert else rows, *shapes[name][1:])
        data, shards, replicas = (
            (mesh.expert_data, mesh.expert_shard, mesh.expert_replicate)
            if is_expert
            else (mesh.data, mesh.shard, mesh.replicate)
        )
        if name not in sharded:
            shards, replicas = ALONE, data
        start, length = row_span(rows, shards)
        begin, first = begin + start, True
        if isinstance(parameter, DTensor):  # FSDP2 sums over replicas itself: each of them updates all that it holds
            replicas, first = ALONE, replicas.index == 0
        start, length = row_span(length, replicas)
        parts[name] = Part(shape, begin + start, begin + start + length, replicas, shards, first)
    return Sharding(parts, mesh, model)


def cast_whole(model: nn.Module, dtype: torch.dtype, sharding: Sharding) -> None:
    """Turn what stays whole between uses into `dtype` (routers refuse to become narrower than FP32)."""
    divided = {p for name, p in model.named_parameters() if sharding.part(name, p).shards.size > 1}
    for module in model.modules():
        if divided.isdisjoint(module.parameters()):
            module.to(dtype)


def _apply_fsdp(model: nn.Module, mesh: Mesh, dtype: torch.dtype) -> set[str]:
    """FSDP2 on every block, on experts apart (their axis is another one), and on the rest. Names of what it took."""
    wide = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    whole = {module.weight for module in model.modules() if isinstance(module, Router)}
    dense_mesh = _device_mesh(mesh, mesh.replicate, mesh.shard)
    for module in model.modules():
        if not isinstance(module, DeepSeekMoE):
            continue
        if mesh.expert_shard.size > 1:
            expert_mesh = _device_mesh(mesh, mesh.expert_replicate, mesh.expert_shard)
            fully_shard(module.experts, mesh=expert_mesh, mp_policy=policy)
        else:
            whole |= set(module.experts.parameters())
    blocks = (*model.get_submodule("layers").children(), *model.get_submodule("mtp").children())
    for module in (*blocks, model):
        fully_shard(module, mesh=dense_mesh, mp_policy=policy, ignored_params=whole)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The step's loss is divided by counts over all ranks already: gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("hidden_states", "extend", "extend_mtp"):
        register_fsdp_forward_method(model, method)
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}


def _device_mesh(mesh: Mesh, replicate: Axis, shard: Axis) -> DeviceMesh:
    assert shard.group is not None
    if replicate.group is None:
        return DeviceMesh.from_group(shard.group, mesh.device.type)
    steps = [rank - replicate.ranks[replicate.index] for rank in replicate.ranks]
    ranks = [[rank + step for rank in shard.ranks] for step in steps]
    return DeviceMesh.from_group(
        [replicate.group, shard.group], mesh.device.type, mesh=ranks, mesh_dim_names=("replicate", "shard")
    )
