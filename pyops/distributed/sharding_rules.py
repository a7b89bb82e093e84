"""How the ops run on DTensors: which dimensions may be split over a mesh, and what comes out.

A row of RULES names the dimensions of an op's tensors by letters (those of the docs; "-" is whole on every rank), inputs | outputs, and the letters that may
be split. Splitting a letter splits every tensor that has it; an output without it is a partial sum. Two letters ("HG") are split together where the mesh
divides both (a rank has whole groups of heads), or the first alone where the second's size is 1. "?a&b": an output that is there when these arguments are;
"!K": whole when K is split, since nothing was summed over K. Anything else that comes is brought to one of these layouts by DTensor.
"""
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from .. import kernels


def _rows(a):
    return a["cu_seqlens"] is None


def _own_slots(name):
    return lambda a: a[name] is None


def _groups_fit(a):
    return a["x"].shape[-1] // a["group_size"] % a["x"].mesh.size() == 0


def _no_bias(a):
    return a.get("bias") is None and not a.get("need_bias") and not a.get("activation")


def _apart(a):
    """Gate and up can be cut alike: they stand in tensors of their own, or alternate, or there is no gate; and no bias is added once for all."""
    ungated = a["w_up"] is None and a["w1"].shape[1] == a["w2"].shape[2]
    return a["bias2"] is None and (a["w_up"] is not None or a["interleaved"] or ungated)


def _one_row_of_angles(a):
    return a["cos"] is None or a["cos"].shape[0] == 1


def _dense(a):
    return not a["sparse_grad"]


def _dense_rows(a):
    return _dense(a) and _rows(a)


ALWAYS = None
B_ROWS = {"B": _rows}
HEADS = {"B": _rows, "HG": ALWAYS}
# op: (inputs | outputs, {letters that may be split: a condition on the arguments})
RULES = {
    "causal_conv1d_fwd": ("BDL DW D BL - BDS | BDL BDS?return_final_states", {"B": _rows, "D": ALWAYS}),
    "causal_conv1d_bwd": ("BDL BDL DW D BL - BDS BDS | BDL DW D?bias BDS?initial_states", {"B": _rows, "D": ALWAYS}),
    "causal_conv1d_update": ("BDL BDS DW D B - | BDL", {"B": _own_slots("conv_state_indices"), "D": ALWAYS}),
    "causal_conv1d_varlen_states": ("TD - | SDW", {"D": ALWAYS}),
    "chunk_scan_fwd": ("BLHP BLH H BLGN BLGN H BLHP H BHPN BL - | BLHP BHPN?return_final_states", HEADS),
    "chunk_scan_bwd": ("BLHP BHPN BLHP BLH H BLGN BLGN H H BHPN BL - | BLHP BLH H BLGN BLGN H?D H?dt_bias BHPN?initial_states", HEADS),
    "selective_state_update": ("BHPN BHP BHP HPN BGN BGN HP BHP HP - | BHP", {"B": _own_slots("state_batch_indices"), "HG": ALWAYS}),
    "rmsnorm_gated_fwd": ("TD D TD | TD", {"T": ALWAYS, "D": _groups_fit}),
    "rmsnorm_gated_bwd": ("TD TD D TD | TD D TD?z", {"T": ALWAYS, "D": _groups_fit}),
    "grouped_gemm_fwd": ("TK EKN - EN | TN", {"N": ALWAYS, "K": _no_bias}),
    "grouped_gemm_bwd": ("TN TK EKN - | TK?need_a EKN?need_b EN?need_bias!K", {"N": ALWAYS, "K": ALWAYS}),
    "grouped_wgrad_fwd": ("TK TN - | EKN", {"K": ALWAYS, "N": ALWAYS}),
    "grouped_wgrad_bwd": ("EKN TK TN - | TK TN", {"K": ALWAYS, "N": ALWAYS}),
    "grouped_gemm_packed": ("- - - - - | -", {}),
    "norm_linear": ("TK - - - - TN | TN", {"T": ALWAYS}),
    "linear_fwd": ("TK NK N | TN", {"T": ALWAYS, "N": ALWAYS, "K": _no_bias}),
    "linear_bwd": ("TN TK NK | TK?need_x NK?need_weight N?need_bias!K", {"T": ALWAYS, "N": ALWAYS, "K": ALWAYS}),
    "fused_experts_fwd": ("TD EFD EFD EDF TA TA EF EF - | TD TF?save", {"T": ALWAYS, "F": _apart}),
    "fused_experts_bwd": ("TD TD EFD EFD EDF TA TA EF EF ED TF | TD?need_x EFD?need_weights EFD?need_weights&w_up EDF?need_weights TA "
                          "EF?need_weights&bias1 EF?need_weights&bias_up ED?need_weights&bias2", {"T": ALWAYS, "F": _apart}),
    "fused_experts_packed": ("TD - - - - - - TA TA - - - | TD", {"T": ALWAYS}),
    "moe_route_fwd": ("TE E | TA TA", {"T": ALWAYS}),
    "moe_route_bwd": ("TA TE TA | TE", {"T": ALWAYS}),
    "moe_permute": ("- | - - -", {}),
    "moe_unpermute_fwd": ("RD - - | TD", {"D": ALWAYS}),
    "moe_unpermute_bwd": ("TD RD - - | RD TA", {"D": ALWAYS}),
    "patch_reduce_fwd": ("BLD BL | BSD", {"B": ALWAYS, "D": ALWAYS}),
    "patch_reduce_bwd": ("BSD BLD BSD BL | BLD", {"B": ALWAYS, "D": ALWAYS}),
    "patch_cross_attention_fwd": ("BLHP BKGP BKGP BI BK - | BLHP", HEADS),
    "patch_cross_attention_bwd": ("BLHP BLHP BKGP BKGP BI BK - | BLHP BKGP BKGP", HEADS),
    "local_attention_fwd": ("BLHP BLGP BLGP BL - | BLHP BHL", HEADS),
    "local_attention_bwd": ("BLHP BLHP BLGP BLGP BLHP BHL BL - | BLHP BLGP BLGP", HEADS),
    "attention_update": ("BW BGSP BGSP B - - | BW", {"B": _one_row_of_angles}),
    "entropy_patch_fwd": ("BLV - B | BL BL BL BL B", B_ROWS),
    "entropy_patch_bwd": ("BL BLV B | BLV", {"B": ALWAYS}),
    "patch_cut": ("BL - B | BL BL BL B", B_ROWS),
    "patcher_update": ("BL BI B | BL BL", {"B": ALWAYS}),
    "patch_ids": ("BS | BL", {"B": ALWAYS}),
    "byte_hash_ids": ("BL - | BLI", B_ROWS),
    "byte_hash_embedding_fwd": ("BL RD VD - | BLD", {"B": _dense_rows, "D": _dense}),
    "byte_hash_embedding_bwd": ("BLD BL - - - | RD?need_table VD?need_bytes -", {"B": _dense_rows, "D": _dense}),
}


def _layouts(op, row, letters, values):
    """[(placements of the outputs, of the arguments)] that the op accepts, for one mesh dimension; the first is whole everywhere."""
    arguments = op._schema.arguments
    named = {argument.name: value for argument, value in zip(arguments, values)}
    inputs, outputs = (part.split() for part in row.split("|"))
    names = iter(inputs)
    has = [next(names) if "Tensor" in str(argument.type) else None for argument in arguments]
    has = [None if value is None else letters_of for letters_of, value in zip(has, values)]
    sizes = {letter: size for letters_of, value in zip(has, values) if letters_of for letter, size in zip(letters_of, value.shape)}
    mesh = next(value for letters_of, value in zip(has, values) if letters_of).mesh

    def layout(split):
        def placed(letters_of):
            return next((Shard(i) for i, letter in enumerate(letters_of) if letter in split), None)

        def given(output):
            output, _, untouched = output.partition("!")
            letters_of, _, needed = output.partition("?")
            there = all(named[name] is not None and named[name] is not False for name in needed.split("&") if name)
            if not split or not there or letters_of == "-" or set(untouched) & set(split):
                return Replicate()
            return placed(letters_of) or Partial()

        return [given(output) for output in outputs], [None if letters_of is None else placed(letters_of) or Replicate() for letters_of in has]

    found = [layout("")]
    for split, condition in letters.items():
        if condition is not None and not condition(named):
            continue
        if len(split) == 2:
            if sizes[split[0]] % mesh.size() or (sizes[split[1]] % mesh.size() and sizes[split[1]] != 1):
                continue
            split = split if sizes[split[1]] != 1 else split[0]
        found.append(layout(split))
    for i, argument in enumerate(arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found = [(out, into) for out, into in found if into[i] in values[i].placements]
            if not found:
                raise ValueError(f"terrazzo.{op._schema.name.partition('::')[2]}: {argument.name} is updated in place, which its placements {values[i].placements} don't "
                                 f"allow; split one of {' '.join(letters)} or keep it whole")
    return found


def _register(op, row, letters):
    register_sharding(op)(lambda *values: _layouts(op, row, letters, values))
    # register_sharding leaves flags and absent tensors in front of the first integer out of the key of DTensor's cache; here layouts depend on them.
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op] = RuntimeSchemaInfo(0, needs_pytree=True)


for _name, (_row, _letters) in RULES.items():
    for _backend in kernels._backends(_name):
        _register(getattr(kernels.ops(_backend), _name).default, _row, _letters)
