"""FSDP2: the weights, gradients and optimizer states of one model, sharded across processes."""

import logging
import os

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from common.errors import UserError
from common.processes import processes
from common.sharding import strategy
from models.families import base_model, vision_encoder

logger = logging.getLogger(__name__)


def check_sharding(args, model_args, scratch_args) -> None:
    """UserError, before anything is loaded, if the run's flags do not fit what accelerate launch was asked for."""
    sharded = strategy()
    if not sharded:
        return
    version, kept = os.environ.get("FSDP_VERSION", "1"), os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    inside = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true"
    refused = {
        f"quantization {model_args.quantization}: quantised weights are not sharded. Use "
        "recipes/accelerate/ddp.yaml, where each process has them all": model_args.quantization,
        f"feature_cache {scratch_args.feature_cache}: cached features need the whole encoder in each process. Leave it "
        "out": scratch_args.feature_cache not in ("auto", "off"),
        "auto_find_batch_size restarts with the original model, which is sharded by then. Set "
        "per_device_train_batch_size by what --dry_run says": args.auto_find_batch_size,
        "save_only_model keeps nothing to resume from, and sharded checkpoints are only for that. Leave it "
        "out": args.save_only_model,
        f"objective {args.objective}: it draws captions in training, which was not tested with ZeRO. Use "
        "recipes/accelerate/fsdp2.yaml": sharded.startswith("ZeRO") and args.objective != "cross_entropy",
        f"torch_compile was not tested with {sharded}. Leave it out": args.torch_compile,
        f"torch {torch.__version__}: torch 2.8 or later is needed. Upgrade torch": sharded == "FSDP"
        and not hasattr(FSDPModule, "set_reshard_after_forward"),
        f"fsdp_version {version}: only FSDP2 is supported. Set fsdp_version: 2": sharded == "FSDP" and version != "2",
        f"fsdp_state_dict_type {kept}: checkpoints are sharded. Set SHARDED_STATE_DICT": sharded == "FSDP"
        and kept != "SHARDED_STATE_DICT",
        "fsdp_activation_checkpointing: in train.py it is --gradient_checkpointing. Leave it out of the "
        "config file": sharded == "FSDP" and inside,
        f"{sharded} shards a model across processes, and there is only one. Pass --num_processes 2 or more": args.world_size
        == 1,
    }
    for why, applies in refused.items():
        if applies:
            processes().wait_for_everyone()  # if one leaves while another still joins, that one ends in a traceback
            raise UserError(f"With {sharded}, {why}.")


def shard(model, args):
    """`model` with its weights sharded across the processes, in place, if the launch asks for FSDP; on GPUs and CPUs.

    The weights are those of the first process: the others may have theirs on the meta device. Each ends with its shard
    on its own device. accelerate's own way (accelerate.utils.fsdp2_prepare_model) is not used: it does not support
    weights that more than two modules share (T5), and matches the optimizer's parameters by the address of their data,
    which empty shards and weights on the meta device do not have.

    Args:
        args: TrainArguments, for the precision and the process group, which they have joined.
    """
    if strategy() != "FSDP":
        return model
    plugin, device = FullyShardedDataParallelPlugin(), args.device
    options = {"mesh": init_device_mesh(device.type, (args.world_size,)), "offload_policy": plugin.cpu_offload}
    if args.autocast_dtype:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=args.autocast_dtype, reduce_dtype=torch.float32)
    options = {name: value for name, value in options.items() if value is not None}
    whole = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    replace_tensors(model, lambda tensor: tensor.to("meta"))
    for unit in units(model):
        fully_shard(unit, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(model, **options)
    for module in model.modules():  # the library looks up what to record by class, and torch makes new classes
        if isinstance(module, PreTrainedModel):
            # Its own __setitem__, from 5.23 on, takes the module; the key is the same in all releases.
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), module._can_record_outputs)
    model.to_empty(device="cpu" if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else device)
    main, shares = processes().is_main_process, list(model.parameters())  # DTensors
    with torch.no_grad():
        for name, part in model.named_parameters():
            first = whole.pop(name)
            first = first.to(device) if main else torch.empty(first.shape, dtype=first.dtype, device=device)
            part.copy_(distribute_tensor(first, part.device_mesh, part.placements))
        for name, part in model.named_buffers():
            if not (first := whole.pop(name)).is_meta:
                part.copy_(first)
            torch.distributed.broadcast(part, src=0)
    here, of = (sum(map(torch.numel, tensors)) for tensors in ([one.to_local() for one in shares], shares))
    logger.info(
        "FSDP: %d processes share the model; this one holds %s of %s weights", args.world_size, f"{here:,}", f"{of:,}"
    )
    # Parts of the model are run by themselves, and torch takes the first one that runs as the root.
    model._get_fsdp_state()._lazy_init()
    return model


def replace_tensors(model, make) -> None:
    """Replaces every weight and buffer by `make(tensor)`; what modules share, they still share afterwards."""
    made = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = torch.nn.Parameter(make(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = make(buffer)


def adopt(accelerator) -> bool:
    """Makes `accelerator` treat a model that `shard` has sharded as one of its own; returns whether there is one.

    On CPUs accelerate silently leaves FSDP out (accelerate.state.AcceleratorState), but nothing that it does for FSDP
    needs a GPU."""
    if strategy() != "FSDP":
        return False
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
        processes().distributed_type = state.distributed_type  # from where other states take it
    prepare = accelerator._prepare_one
    accelerator._prepare_fsdp2 = lambda *objects: tuple(
        one if isinstance(one, torch.nn.Module) else prepare(one, first_pass=True) for one in objects
    )
    return True


def fill_in_states(optimizer) -> None:
    """Gives zero states to weights that never had a gradient, such as an encoder's last norm that a family skips: torch
    writes no state for them, but expects one in a checkpoint."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    example, state = next(((one, optimizer.state[one]) for one in parameters if optimizer.state.get(one)), (None, {}))
    for parameter in parameters:
        if not optimizer.state.get(parameter):
            optimizer.state[parameter] = {
                name: torch.zeros_like(parameter if value.shape == example.shape else value)
                for name, value in state.items()
            }


def whole_state(model) -> dict:
    """On the first process the state dict that the model would have if it were not sharded, or for an adapter the
    trained part; {} on the others. All processes call it."""
    adapter = isinstance(model, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
    state, names = get_model_state_dict(model, options=options), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, name)
        if names[parameter] in state:  # one tensor under two names is written once
            state[name] = state[names[parameter]]
    return state


def units(model) -> list[torch.nn.Module]:
    """The modules whose weights are gathered when they run and released then: the layers, and modules that are run
    by themselves, outside the model's own forward (the vision encoder, and what is between it and the language model).
    All other weights are gathered once per step: those that modules share, such as word embeddings."""
    base = base_model(model)
    words = base.get_input_embeddings()
    modules = [vision_encoder(base)]
    modules += [module for module in base.base_model.children() if words not in module.modules()]
    layers = [module for module in base.modules() if isinstance(module, torch.nn.ModuleList)]
    modules += [layer for layer_list in layers for layer in layer_list]
    seen = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        seen.setdefault(parameter, []).append(name)
    shared = {parameter for parameter, names in seen.items() if len(names) > 1}
    modules = [module for module in modules if (parameters := set(module.parameters())) and not parameters & shared]
    order = {module: number for number, module in enumerate(base.modules())}
    return sorted(dict.fromkeys(modules), key=order.get, reverse=True)  # the inner ones first
