"""terrazzo.compat: upstream's module paths and signatures, installed only where the real packages are absent."""
import importlib
import importlib.util
import inspect
import subprocess
import sys
import types

import pytest
import terrazzo
import torch
import torch.nn.functional as F
from terrazzo import compat

INF = float("inf")
UPSTREAM = {
    "causal_conv1d": ["causal_conv1d_fn", "causal_conv1d_update"],
    "causal_conv1d.causal_conv1d_interface": [
        "causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
        "final_states_out=None, activation=None)",
        "causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
        "conv_state_indices=None)",
        "causal_conv1d_ref(x, weight, bias=None, initial_states=None, return_final_states=False, "
        "final_states_out=None, activation=None)",
        "causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None)",
    ],
    "causal_conv1d.causal_conv1d_varlen": [
        "causal_conv1d_varlen_states(x, cu_seqlens, state_len)",
        "causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len)",
    ],
    "grouped_gemm.ops": [
        "gmm(a, b, batch_sizes, trans_b=False)",
        "permute(input_act, indices, num_out_tokens=None, max_token_num=0)",
        "unpermute(input_act, row_id_map, probs=None)",
    ],
    "grouped_gemm.backend": ["gmm(a, b, batch_sizes, trans_a=False, trans_b=False, c=None)"],
    "mamba_ssm.ops.triton.ssd_combined": [
        "mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, "
        "seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, "
        "return_varlen_states=False)",
        "mamba_split_conv1d_scan_combined(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, "
        "initial_states=None, seq_idx=None, dt_limit=(0.0, inf), return_final_states=False, activation='silu', "
        "rmsnorm_weight=None, rmsnorm_eps=1e-06, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, "
        "norm_before_gate=True)",
    ],
    "mamba_ssm.ops.triton.selective_state_update": [
        "selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
        "state_batch_indices=None)",
        "selective_state_update_ref(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False)",
    ],
    "mamba_ssm.ops.triton.layernorm_gated": [
        "rmsnorm_fn(x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True)",
        "layernorm_fn(x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True, is_rms_norm=False)",
        "RMSNorm(hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None)",
        "LayerNorm(hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None)",
    ],
}


@pytest.fixture
def installed():
    with compat.install() as handle:
        yield handle


@pytest.mark.filterwarnings("ignore:terrazzo.compat.install")
@pytest.mark.parametrize("module_name", UPSTREAM)
def test_module_paths_and_signatures(module_name, installed):
    module = importlib.import_module(module_name)
    assert module is sys.modules[module_name] and module_name in installed.names
    assert importlib.util.find_spec(module_name).name == module_name
    for text in UPSTREAM[module_name]:
        name = text.split("(")[0]
        if "(" not in text:
            assert callable(getattr(module, name))
            continue
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        positional = [str(p.replace(annotation=p.empty)) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert f"{name}({', '.join(positional)})" == text
        # transformers keeps only keyword arguments that the signature names.
        assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    # The same under terrazzo.compat, without installing anything.
    own = importlib.import_module(f"terrazzo.compat.{module_name}")
    assert own is not module and getattr(own, name)


@pytest.mark.filterwarnings("ignore:terrazzo.compat.install")
def test_undo_takes_out_what_was_put_in():
    assert importlib.util.find_spec("causal_conv1d") is None
    before = set(sys.modules)
    handle = compat.install()
    assert {"causal_conv1d", "mamba_ssm", "mamba_ssm.ops.triton.ssd_combined"} <= set(handle.names)
    assert set(compat.install().present) == {"causal_conv1d", "mamba_ssm", "grouped_gemm"}
    handle.undo()
    handle.undo()
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] in compat.PACKAGES}
    assert importlib.util.find_spec("causal_conv1d") is None and importlib.util.find_spec("mamba_ssm") is None


@pytest.mark.filterwarnings("ignore:terrazzo.compat.install")
def test_real_packages_are_left_alone(monkeypatch, tmp_path):
    imported = types.ModuleType("causal_conv1d")
    monkeypatch.setitem(sys.modules, "causal_conv1d", imported)
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with compat.install() as handle:
        assert handle.present == ["causal_conv1d", "mamba_ssm"] and {n.split(".")[0] for n in handle.names} == {"grouped_gemm"}
        assert sys.modules["causal_conv1d"] is imported
    assert sys.modules["causal_conv1d"] is imported


def test_a_model_imported_before_is_named():
    pytest.importorskip("transformers")
    importlib.import_module("transformers.models.bamba.modeling_bamba")
    with pytest.warns(UserWarning, match="has already imported bamba.* use terrazzo.patch"):
        compat.install().undo()


def test_installing_is_light():
    code = "import terrazzo.compat, sys; terrazzo.compat.install(); print('transformers' in sys.modules, 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False"], done.stderr[-1000:]


@pytest.mark.filterwarnings("ignore:terrazzo.compat.install")
def test_the_functions_run_on_terrazzo(installed):
    conv = importlib.import_module("causal_conv1d")
    interface = importlib.import_module("causal_conv1d.causal_conv1d_interface")
    update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=g)
    x, weight, bias = rand(2, 8, 11), rand(8, 4), rand(8)
    terrazzo.reset_counters()
    torch.testing.assert_close(
        conv.causal_conv1d_fn(x, weight, bias, activation="silu"), interface.causal_conv1d_ref(x, weight, bias, activation="silu")
    )
    state, other = rand(2, 8, 4), None
    other = state.clone()
    torch.testing.assert_close(
        conv.causal_conv1d_update(x[:, :, 0], state, weight, bias), interface.causal_conv1d_update_ref(x[:, :, 0], other, weight, bias)
    )
    torch.testing.assert_close(state, other)
    state = rand(2, 3, 4, 16)
    other = state.clone()
    args = rand(2, 3, 4), rand(2, 3, 4), -rand(3, 4, 16).abs(), rand(2, 1, 16), rand(2, 1, 16)
    torch.testing.assert_close(
        update.selective_state_update(state, *args, dt_softplus=True),
        update.selective_state_update_ref(other, *args, dt_softplus=True),
    )
    torch.testing.assert_close(state, other)
    for op in ("causal_conv1d_fn", "causal_conv1d_update", "selective_state_update"):
        assert terrazzo.counters()[op] == {"cpu": 1, "reference": 1}


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("with_bias, gated, rms", [(b, z, r) for b in (0, 1) for z in (0, 1) for r in (0, 1)])
def test_gated_norms(norm_before_gate, with_bias, gated, rms):
    from terrazzo.compat.mamba_ssm.ops.triton import layernorm_gated

    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 5, 16, generator=g), torch.randn(16, generator=g)
    bias = torch.randn(16, generator=g) if with_bias else None
    z = torch.randn(3, 5, 16, generator=g) if gated else None
    got = layernorm_gated.layernorm_fn(x, weight, bias, z, 1e-5, 8, norm_before_gate, is_rms_norm=bool(rms))
    y = x * F.silu(z) if gated and not norm_before_gate else x
    groups = y.unflatten(-1, (2, 8)).double()
    if not rms:
        groups = groups - groups.mean(-1, keepdim=True)
    want = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight
    want = want + bias if with_bias else want
    want = want * F.silu(z) if gated and norm_before_gate else want
    torch.testing.assert_close(got, want.float())


@pytest.mark.parametrize("name, keys", [("RMSNorm", ["weight"]), ("LayerNorm", ["weight", "bias"])])
def test_norm_modules(name, keys):
    from terrazzo.compat.mamba_ssm.ops.triton import layernorm_gated

    norm = getattr(layernorm_gated, name)(16, group_size=8, norm_before_gate=False, dtype=torch.bfloat16)
    assert list(norm.state_dict()) == keys and norm.weight.dtype == torch.bfloat16
    x = torch.randn(3, 16).bfloat16().requires_grad_()
    y = norm(x, torch.randn(3, 16).bfloat16())
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and all(t.grad.abs().sum() > 0 for t in (x, *norm.parameters()))
    norm.reset_parameters()


@pytest.mark.filterwarnings("ignore:terrazzo.compat.install")
def test_grouped_gemm(installed):
    """A layer of experts written against grouped_gemm, with the gradients that its users take."""
    from grouped_gemm import backend, ops

    torch.manual_seed(0)
    x, w = torch.randn(10, 6, requires_grad=True), torch.randn(4, 5, 6, requires_grad=True)
    probs, indices = torch.rand(10, 2), torch.rand(10, 4).argsort(1)[:, :2].int()
    rows, row_map = ops.permute(x, indices)
    sizes = indices.flatten().bincount(minlength=4)
    y = ops.unpermute(ops.gmm(rows, w, sizes, trans_b=True), row_map, probs)
    expected = torch.einsum("td,tafd,ta->tf", x, w[indices.long()], probs)
    torch.testing.assert_close(y, expected)
    for a, b in zip(torch.autograd.grad(y.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w))):
        torch.testing.assert_close(a, b)
    out = torch.empty(4, 6, 5)
    assert backend.gmm(rows.detach(), torch.randn(20, 5), sizes, trans_a=True, c=out) is out
    with pytest.raises(NotImplementedError, match="tokens are never dropped"):
        ops.permute(x, indices, num_out_tokens=7)
    with pytest.raises(AttributeError, match="it has gmm, permute and unpermute"):
        ops.sinkhorn
