"""transformers' models through the kernels: the same logits, gradients and tokens as without, and everything as before at the end."""

import copy
import sys
import threading

import pytest
import torch
from parity import relative
from torch import nn

from cpu_mamba import transformers as integration
from cpu_mamba.transformers import use_in_transformers

transformers = pytest.importorskip("transformers")
FAMILIES = ["mamba", "falcon_mamba", "jamba"]
OWN = {mixer: mixer.forward for mixer, _ in integration.find_mixers()}
TOKENS = dict(vocab_size=50, pad_token_id=0, eos_token_id=1, bos_token_id=2)


def make(family, **options):
    """A small random model whose norms, biases and skips are not 1 and 0."""
    torch.manual_seed(0)
    if family == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, **TOKENS, **options))
    elif family == "falcon_mamba":
        config = transformers.FalconMambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, **TOKENS, **options)
        model = transformers.FalconMambaForCausalLM(config)
    else:
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, mamba_d_state=8)
        layers = dict(mamba_dt_rank=4, attn_layer_period=3, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1, use_mamba_kernels=False)
        model = transformers.JambaForCausalLM(transformers.JambaConfig(**sizes, **layers, **TOKENS, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm.weight" in name or name.endswith((".D", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make(request.param)


@pytest.fixture
def calls(monkeypatch):
    """How often the layers went through the kernels, by the function that took them, and how often they did not."""
    names = []

    def counted(name, function):
        def call(*args):
            result = function(*args)
            names.append("own path" if result is None else name)
            return result
        return call
    for name in ("run", "whole_sequence", "token_step", "fused_inner"):
        monkeypatch.setattr(integration, name, counted(name, getattr(integration, name)))
    return names


@pytest.fixture(autouse=True)
def left_as_found():
    """No test leaves a mixer replaced."""
    yield
    assert not integration.USERS and not integration.ORIGINALS and not any(replaced())


def prompts(batch=2, length=17):
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def padded(ids, left=5, right=0):
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    if right:
        mask[1, -right:] = 0
    return mask


def with_and_without(work):
    want = work()
    with use_in_transformers():
        got = work()
    return got, want


newer = pytest.mark.skipif(any(hasattr(mixer, "slow_forward") for mixer in OWN), reason="this version takes a prompt and single tokens alone")


def mixer_of(model):
    return next(part for part in model.modules() if type(part).__name__.endswith("Mixer"))


@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_logits(model, calls, length, cached):
    ids = prompts(length=length)
    got, want = with_and_without(lambda: model(ids, use_cache=cached).logits)
    assert relative(got, want) < 1e-5 and calls.count("whole_sequence") == 2 and "own path" not in calls


@pytest.mark.parametrize("right", [0, 4])
@torch.no_grad()
def test_logits_of_padded_batches(model, calls, right):
    """At every position, those of the padding too."""
    ids = prompts()
    got, want = with_and_without(lambda: model(ids, attention_mask=padded(ids, right=right), use_cache=False).logits)
    assert relative(got, want) < 1e-5 and calls.count("whole_sequence") == 2
    unpadded = model(ids[:1, 5:]).logits
    assert relative(got[:1, 5:], unpadded) < 1e-4 or "Jamba" in type(model).__name__  # there positions count from the padding on


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(model, calls, masked):
    """Loss and the gradient of every parameter."""
    ids = prompts()

    def train():
        here = copy.deepcopy(model).train()
        loss = here(ids, labels=ids, attention_mask=padded(ids) if masked else torch.ones_like(ids)).loss
        loss.backward()
        return loss, {name: p.grad for name, p in here.named_parameters() if p.grad is not None}
    (loss, got), (wanted_loss, want) = with_and_without(train)
    assert relative(loss, wanted_loss) < 1e-5 and got.keys() == want.keys()
    assert all(relative(got[name], g) < 1e-4 for name, g in want.items() if g.abs().max() > 1e-7)
    assert calls.count("fused_inner") == (2 if mixer_of(model).__class__.__name__ == "MambaMixer" and not masked else 0)


def test_gradient_checkpointing():
    model, ids = make("mamba").train(), prompts()
    model.gradient_checkpointing_enable()

    def train():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.backbone.layers[0].mixer.A_log.grad.clone()
    got, want = with_and_without(train)
    assert relative(got, want) < 1e-4


@pytest.mark.parametrize("case", [dict(), dict(left=6), dict(length=2), dict(num_beams=3), dict(do_sample=True)], ids=str)
def test_generation(model, calls, case):
    """The same tokens: greedy, batched with padding on the left, after a prompt shorter than the convolution, by beams, sampled from one seed."""
    case = dict(do_sample=False) | case
    ids = prompts(length=case.pop("length", 12))
    mask = padded(ids, case.pop("left", 0))

    def generate():
        torch.manual_seed(3)
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, **case)
    got, want = with_and_without(generate)
    assert got.shape == (2, ids.shape[1] + 12) and torch.equal(got, want)
    assert calls.count("token_step") >= 2 * 10


@newer
@torch.no_grad()
def test_cache_steps_and_chunks(model, calls):
    """Prompt, single tokens, and several tokens after cached ones (transformers' own path), each from the cache that the one before left."""
    ids = prompts(length=14)
    name = next(name for name in ("cache", "cache_params", "past_key_values") if name in model(ids, use_cache=True))

    def parts():
        out, logits = None, []
        for first, last in ((0, 5), (5, 6), (6, 7), (7, 8)):
            out = model(ids[:, first:last], use_cache=True, **({} if out is None else {name: out[name]}))
            logits.append(out.logits)
        return torch.cat(logits, 1), model(ids[:, 8:11], use_cache=True, **{name: out[name]}).logits
    got, want = with_and_without(parts)
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, want))
    assert calls.count("token_step") == 6 and calls.count("own path") == 2
    assert relative(got[0], model(ids[:, :8]).logits) < 1e-5


@newer
@torch.no_grad()
def test_a_masked_token_and_a_recording_cache(calls):
    """A single token that is padding, and a cache that keeps more than the last inputs so that it can be cropped, are transformers' own."""
    model, ids = make("mamba"), prompts(length=6)

    def parts(record):
        out = model(ids, use_cache=True)
        name = "cache" if "cache" in out else "cache_params"
        for layer in out[name].layers:
            if record:
                layer.activate_past_recording()
        y = mixer_of(model)(torch.ones(2, 1, 32), **{name: out[name]}, attention_mask=None if record else torch.tensor([[0], [1]]))
        return y, out[name].layers[0].conv_states[0]
    for record in (False, True):
        got, want = with_and_without(lambda: parts(record))
        assert got[1].shape == want[1].shape and all(relative(a, b) < 1e-5 for a, b in zip(got, want))
    assert calls.count("own path") == 2 and "token_step" not in calls


def test_options_of_the_mixers():
    """Biases of the projections, no bias of the convolution, other widths."""
    ids = prompts()
    for family, options in (("mamba", dict(use_bias=True, use_conv_bias=False, conv_kernel=3)), ("mamba", dict(conv_kernel=1)),
                            ("falcon_mamba", dict(use_bias=True)), ("jamba", dict(mamba_proj_bias=True, mamba_d_conv=2))):
        model = make(family, **options)
        with torch.no_grad():
            got, want = with_and_without(lambda: model(ids, attention_mask=padded(ids), use_cache=False).logits)
        assert relative(got, want) < 1e-5, (family, options)
        got, want = with_and_without(lambda: model.generate(ids, attention_mask=padded(ids), max_new_tokens=6, do_sample=False))
        assert torch.equal(got, want), (family, options)


# transformers' own path

def other_linear(mixer):
    mixer.dt_proj = type("Quantised", (nn.Linear,), {})(mixer.dt_proj.in_features, mixer.dt_proj.out_features)


@pytest.mark.parametrize("spoil", [
    lambda mixer: mixer.conv1d.register_forward_hook(lambda *args: None), lambda mixer: mixer.dt_proj.register_forward_pre_hook(lambda *args: None),
    other_linear, lambda mixer: mixer.double(), lambda mixer: setattr(mixer, "activation", "gelu")])
@torch.no_grad()
def test_what_is_left_to_transformers(calls, spoil):
    """Hooks and replacements on what the kernels pass by, float64, another activation: bit by bit what transformers computes."""
    mixer = mixer_of(make("falcon_mamba"))
    spoil(mixer)
    x = torch.randn(2, 9, 32, dtype=mixer.D.dtype)
    got, want = with_and_without(lambda: mixer(x))
    assert torch.equal(got, want) and "whole_sequence" not in calls


@torch.no_grad()
def test_hooks_on_what_is_called(calls):
    """Hooks on the projections run and count, as does a module put in the place of one."""
    mixer, x, seen = mixer_of(make("mamba")), torch.randn(2, 9, 32), []
    mixer.in_proj.register_forward_hook(lambda module, args, out: seen.append("in_proj") or out * 2)
    mixer.x_proj.register_forward_hook(lambda module, args, out: seen.append("x_proj") or out / 2)
    mixer.out_proj = nn.Sequential(mixer.out_proj, nn.Tanh())
    got, want = with_and_without(lambda: mixer(x))
    assert relative(got, want) < 1e-5 and seen == ["in_proj", "x_proj"] * 2 and "whole_sequence" in calls and "fused_inner" not in calls


@torch.no_grad()
def test_subclasses_meta_and_compilers(calls):
    """A subclass, the meta device and torch.compile take transformers' path."""
    mixer, x = mixer_of(make("mamba")), torch.randn(2, 5, 32)
    child = copy.deepcopy(mixer)
    child.__class__ = type("Child", (type(mixer),), {})
    got, want = with_and_without(lambda: child(x))
    assert torch.equal(got, want)
    with use_in_transformers():
        assert copy.deepcopy(mixer).to("meta")(x.to("meta")).shape == x.shape
    compiled, want = torch.compile(mixer, backend="eager", fullgraph=True), mixer(x)
    with use_in_transformers():
        assert relative(compiled(x), want) < 1e-5
    assert "whole_sequence" not in calls


@torch.no_grad()
def test_half_precision(model):
    """No further from the float32 model than transformers' own path in bfloat16 is, but for a small margin."""
    ids = prompts()
    want, half = model(ids).logits, copy.deepcopy(model).bfloat16()
    got, plain = with_and_without(lambda: half(ids).logits.float())
    assert (got - want).square().mean() < 1.2 * (plain - want).square().mean() and got.isfinite().all()


# On and off

def replaced():
    return [mixer.forward is not own for mixer, own in OWN.items()]


def test_undone_on_exit_and_on_errors():
    with use_in_transformers():
        assert all(replaced())
    assert not any(replaced())
    with pytest.raises(KeyError):
        with use_in_transformers():
            raise KeyError
    assert not any(replaced())


def test_nested_and_plain_calls(calls):
    """On until the last one ends, whatever the order; undoing one twice is nothing."""
    mixer, x = mixer_of(make("mamba")), torch.randn(1, 3, 32)
    outer = use_in_transformers()
    with use_in_transformers():
        inner = use_in_transformers()
    outer.undo()
    outer.undo()
    mixer(x)
    assert len(integration.USERS) == 1 and all(replaced()) and "whole_sequence" in calls
    inner.undo()
    calls.clear()
    mixer(x)
    assert not any(replaced()) and not calls


def test_a_forward_kept_from_inside_is_transformers_own_outside(calls):
    """A bound method taken while it was on does not go through the kernels once it is off."""
    mixer, x = mixer_of(make("mamba")), torch.randn(1, 3, 32)
    with use_in_transformers():
        kept = mixer.forward
    assert torch.equal(kept(x), mixer(x)) and not calls


def test_threads_may_turn_it_on_and_off():
    """Many at once, and it is off after the last."""
    def work():
        for _ in range(50):
            with use_in_transformers():
                assert integration.ORIGINALS
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not integration.USERS and not any(replaced())


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="use_in_transformers needs the package transformers"):
        use_in_transformers()


def test_an_unknown_version(monkeypatch):
    """A mixer that is gone, or that works in another way, is an error that names the version, and nothing is replaced."""
    from transformers.models.jamba import modeling_jamba
    kind = modeling_jamba.JambaMambaMixer
    with monkeypatch.context() as patch:
        patch.delattr(modeling_jamba, "JambaMambaMixer")
        with pytest.raises(RuntimeError, match=f"transformers {transformers.__version__}: its JambaMambaMixer is not found"):
            use_in_transformers()
    with monkeypatch.context() as patch:
        for owner, name in ((kind, "slow_forward"), (modeling_jamba, "apply_mask_to_padding_states")):
            patch.delattr(owner, name, raising=False)
        with pytest.raises(RuntimeError, match="JambaMambaMixer works is not known"):
            use_in_transformers()
