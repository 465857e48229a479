"""Padding-free batches and shared prompts: TRL's results from one row, and refusals where it would not give them."""

from __future__ import annotations

import itertools

import packing_kit as kit
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastdpo.integrations.trl import patched
from fastdpo.integrations.trl_packing import attention, forward, support
from fastdpo.integrations.trl_packing.forward import PackedForward, packed
from fastdpo.integrations.trl_packing.layout import layout

OPTIONS = ("padding_free", "shared_prompt")
CUTS = {
    "plain": {},
    "nothing_in_common": {"prompts": (0, 0), "chosen": (4, 5), "rejected": (6, 1)},
    "one_token_in_common": {"prompts": (1, 1), "chosen": (4, 5), "rejected": (6, 1)},
    "no_completion": {"prompts": (5, 3), "chosen": (0, 2), "rejected": (0, 0)},
    "an_empty_row": {"prompts": (0, 2), "chosen": (0, 2), "rejected": (3, 1)},
    "one_pair": {"prompts": (5,), "chosen": (1,), "rejected": (1,)},
}


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_the_layout_of_the_docstring():
    rows = torch.tensor([[1, 2, 3, 10, 11, 12], [1, 2, 3, 20, 21, 0]])
    mask = (rows != 0).long()
    labels = rows.masked_fill(rows < 10, -100)
    found = layout(rows, mask, labels, shared_prompt=True)
    assert found.pack(rows).tolist() == [[1, 2, 3, 10, 11, 12, 3, 20, 21]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4]]
    assert (found.lengths, found.parents) == ([2, 4, 3], [-1, 0, 0])
    assert found.place.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 8, 9]]
    assert found.unpack(found.pack(rows)).tolist() == rows.tolist()
    found = layout(rows, mask, labels, shared_prompt=False)
    assert found.pack(rows).tolist() == [[1, 2, 3, 10, 11, 12, 1, 2, 3, 20, 21]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]]
    assert (found.lengths, found.parents) == ([6, 5], [-1, -1])
    flash = attention.flash_keywords(found)
    assert flash["cu_seq_lens_q"].tolist() == flash["cu_seq_lens_k"].tolist() == [0, 6, 11]
    assert flash["cu_seq_lens_q"].dtype == torch.int32
    assert (flash["max_length_q"], flash["max_length_k"]) == (6, 6)


def test_prompts_that_were_cut_differently_are_not_shared():
    """keep_end: the longer completion pushes its prompt out; a token in common by chance may be shared all the same."""
    rows = torch.tensor([[2, 3, 4, 10, 11], [4, 20, 21, 22, 23], [7, 7, 7, 30, 31], [7, 7, 32, 33, 34]])[[0, 2, 1, 3]]
    labels = rows.masked_fill(rows < 10, -100)
    found = layout(rows, torch.ones_like(rows), labels, shared_prompt=True)
    assert (found.lengths, found.parents) == ([5, 5, 1, 4, 4], [-1, -1, -1, 2, 2])
    # The same tokens, but a target in one row only: not the same
    labels[1, 1] = 7
    assert layout(rows, torch.ones_like(rows), labels, shared_prompt=True).lengths == [5, 5, 5, 5]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("window", [None, 3])
def test_a_token_sees_what_its_sequence_says(cut, option, window):
    batch = kit.pair_batch(**CUTS[cut])
    found = layout(**batch, shared_prompt=option == "shared_prompt")
    total, width = len(found.source), found.place.shape[1]
    expected = torch.zeros(total, total, dtype=torch.bool)
    for row, length in zip(found.place, batch["attention_mask"].sum(1), strict=True):
        for query, key in itertools.product(range(length), repeat=2):
            expected[row[query], row[key]] |= 0 <= query - key < (window or width)
    every = torch.arange(total)
    assert torch.equal(found.sees(window)(every[:, None], every), expected)
    assert sum(found.lengths) == total
    assert torch.equal(found.unpack(found.pack(batch["input_ids"])), batch["input_ids"])
    # Each form that a kernel takes says the same
    additive = attention.additive_mask(found, window, torch.float16)
    assert torch.equal(additive[0, 0] == 0, expected) and additive.dtype == torch.float16
    block = attention.block_mask(found, window)
    assert block.shape == (1, 1, total, total)
    q, k, v = torch.randn(3, 1, 2, total, 16)
    dense = scaled_dot_product_attention(q, k, v, attn_mask=expected)
    torch.testing.assert_close(torch.nn.attention.flex_attention.flex_attention(q, k, v, block_mask=block), dense)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("window", [None, 3])
def test_segments_equal_a_dense_mask(cut, option, window):
    """With their gradients, and with fewer key heads than query heads."""
    found = layout(**kit.pair_batch(**CUTS[cut]), shared_prompt=option == "shared_prompt")
    total = len(found.source)
    every = torch.arange(total)
    inputs = [torch.randn(1, heads, total, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    results = []
    for mask in (found.sees(window)(every[:, None], every)[None, None], attention.segment_table(found, window)):
        out, _ = attention.segment_attention(module, *inputs, mask, scaling=0.3, sliding_window=window)
        assert out.shape == (1, total, 4, 8)
        results.append([out, *torch.autograd.grad((out * out).sum(), inputs)])
    for dense, segments in zip(*results, strict=True):
        torch.testing.assert_close(segments, dense)


def test_bad_batches():
    batch = kit.pair_batch()
    with pytest.raises(ValueError, match="attention_mask: expected rows padded on the right"):
        layout(**{**batch, "attention_mask": batch["attention_mask"].flip(1)}, shared_prompt=False)
    with pytest.raises(ValueError, match="attention_mask: expected at least one token"):
        layout(**{**batch, "attention_mask": batch["attention_mask"] * 0}, shared_prompt=False)
    with pytest.raises(ValueError, match="expected chosen rows and as many rejected rows, got 3 rows"):
        layout(*(x[:3] for x in batch.values()), shared_prompt=True)
    assert layout(*(x[:3] for x in batch.values()), shared_prompt=False).lengths == [14, 9, 5]


# --- models ----------------------------------------------------------------------------------------------------------


def results(model, batch, block):
    """TRL's fields and the gradients of a weighted sum of two of them, within a with-block."""
    with patched(), block:
        out = model(**batch, fused_lm_head=True, use_cache=False)
    weights = torch.linspace(-1, 1, out.log_probs.numel()).view_as(out.log_probs)
    model.zero_grad()
    (out.log_probs * weights + out.entropy * weights.flip(0)).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return dict(out), gradients


def assert_equal_results(model, batch, option):
    own = model.forward
    padded, padded_gradients = results(model, batch, packed())
    one = PackedForward(model, option)
    row, gradients = results(model, batch, packed(one))
    assert model.forward == own, "TRL's forward is back"
    assert padded.keys() == row.keys()
    for name, value in padded.items():
        torch.testing.assert_close(row[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    largest = max(gradient.norm() for gradient in padded_gradients.values())
    for name, gradient in padded_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * largest, name
    return one


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("architecture", "kernel", "form"),
    [
        ("llama", "sdpa", "segments"),
        ("llama", "eager", "additive"),
        ("mistral", "sdpa", "segments"),  # one window for all layers
        ("mistral", "eager", "additive"),
        ("gemma3", "sdpa", "segments"),  # windows on some
        ("gemma3", "eager", "additive"),
        ("mixtral", "sdpa", "segments"),
        ("gpt2", "sdpa", "segments"),  # learned positions
        ("gpt_oss", "eager", "additive"),  # attention sinks; transformers makes no mask of its own from positions
        ("falcon", "eager", "additive"),
    ],
)
def test_packed_equals_padded(architecture, kernel, form, option):
    assert assert_equal_results(kit.fused_model(architecture, kernel), kit.pair_batch(), option).plan.form == form


@pytest.mark.parametrize("cut", CUTS)
def test_packed_equals_padded_however_pairs_were_cut(cut):
    assert_equal_results(kit.fused_model("gemma3"), kit.pair_batch(**CUTS[cut]), "shared_prompt")


@pytest.mark.parametrize("option", OPTIONS)
def test_flex_attention(option, monkeypatch):
    """Forward alone, and not compiled: flex attention has no gradient on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as theirs

    monkeypatch.setattr(
        theirs, "compile_friendly_flex_attention", lambda q, k, v, training, **kw: flex_attention(q, k, v, **kw)
    )
    batch = kit.pair_batch()
    with torch.no_grad(), patched():
        expected = kit.fused_model("gemma3")(**batch, fused_lm_head=True)
        model = kit.fused_model("gemma3", "flex_attention")
        one = PackedForward(model, option)
        with packed(one):
            found = model(**batch, fused_lm_head=True)
    assert one.plan.form == "blocks"
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


def test_flash_attention_gets_the_lengths(monkeypatch):
    """A kernel in FlashAttention's place that knows of the sequences what cu_seq_lens say, and no mask."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    calls = []

    def varlen(
        module, query, key, value, mask, cu_seq_lens_q=None, cu_seq_lens_k=None, sliding_window=None, **keywords
    ):
        if cu_seq_lens_q is None:  # the sequences alone, of one length
            return plain(module, query, key, value, mask, sliding_window=sliding_window, **keywords)
        assert mask is None and cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
        assert keywords["max_length_q"] == keywords["max_length_k"] == int(cu_seq_lens_q.diff().max())
        assert type(keywords["max_length_q"]) is int
        calls.append(cu_seq_lens_q.tolist())
        ends = list(itertools.pairwise(cu_seq_lens_q.tolist()))
        parts = [
            plain(
                module,
                *(x[:, :, start:stop] for x in (query, key, value)),
                None,
                sliding_window=sliding_window,
                **keywords,
            )
            for start, stop in ends
        ]
        return torch.cat([part for part, _ in parts], dim=1), None

    def plain(module, query, key, value, mask, sliding_window=None, scaling=None, **_):
        n = query.shape[2]
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        seen = seen.triu(1 - sliding_window) if sliding_window else seen
        return attention.sdpa_attention_forward(module, query, key, value, seen[None, None], scaling=scaling)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_of_the_test", varlen)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_attention_of_the_test", flash_attention_mask)
    batch = kit.pair_batch()
    with patched():
        expected = kit.fused_model("gemma3")(**batch, fused_lm_head=True)
        model = kit.fused_model("gemma3")
        model.config._attn_implementation = "flash_attention_of_the_test"
        with pytest.raises(ValueError, match="shared_prompt: .* flash_attention_of_the_test knows no mask of pairs"):
            PackedForward(model, "shared_prompt")
        with packed(PackedForward(model, "padding_free")):
            found = model(**batch, fused_lm_head=True)
    assert calls[-1] == [0, 14, 23, 28, 31, 40, 54, 61, 68]
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


def test_padding_and_prompts_are_not_computed():
    model, batch = kit.fused_model("llama"), kit.pair_batch()
    tokens = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: tokens.append(args[0].numel()))
    for option in OPTIONS:
        with packed(PackedForward(model, option)), patched():
            for _ in range(2):
                model(**batch, fused_lm_head=True)
    every = int(batch["attention_mask"].sum())
    once = every - (6 + 2 - 1) - (4 - 1) - (3 - 1)  # common tokens of three pairs, less the one that heads both
    assert tokens == [48, 48, 48, every, every, 38, 48, 48, once, once], (
        "a probe of three passes, and two batches, each"
    )


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("architecture", "kernel", "reason"),
    [
        ("mamba", "eager", r"layers \(linear_attention\) that do not stop where a sequence does"),
        ("rwkv", "eager", "recurrent layers that do not stop"),
        ("lfm2", "sdpa", r"layers \(conv\) that do not stop"),
        ("qwen3_next", "sdpa", r"layers \(linear_attention\) that do not stop"),
        ("gpt_neo", "eager", r"layers \(local\) that do not stop"),
        ("falcon", "sdpa", "its sdpa attention is its own, .* expected eager"),
        ("bloom", "eager", "it takes no position_ids"),
        ("llama_not_causal", "sdpa", "its attention is not causal"),
    ],
)
def test_models_that_would_leak_are_refused(architecture, kernel, reason, option):
    model = kit.fused_model(architecture, kernel)
    with pytest.raises(ValueError, match=f"{option}: {type(model).__name__} cannot run packed: .*{reason}"):
        PackedForward(model, option)


def test_an_unknown_kernel_is_refused():
    model = kit.fused_model("llama")
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match=r"attn_implementation 'paged\|sdpa' may not keep sequences apart"):
        support.plan(model, "padding_free")


@pytest.mark.parametrize("option", OPTIONS)
def test_a_leak_that_no_configuration_tells_is_found(option):
    """A short convolution over the embeddings."""
    model, batch = kit.fused_model("llama"), kit.pair_batch()
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out + out.roll(1, 1))
    model.train()
    with (
        pytest.raises(ValueError, match=f"{option}: LlamaForCausalLM cannot run packed: .*leak into each other"),
        packed(PackedForward(model, option)),
    ):
        model(**batch, fused_lm_head=True)
    assert all(module.training for module in model.modules())


def test_positions_that_do_not_start_anew_are_found(monkeypatch):
    model = kit.fused_model("gpt2")
    embed = model.transformer.wpe.forward
    monkeypatch.setattr(model.transformer.wpe, "forward", lambda ids: embed(torch.arange(ids.shape[1])[None]))
    with pytest.raises(ValueError, match="positions do not start anew"), packed(PackedForward(model, "padding_free")):
        model(**kit.pair_batch(), fused_lm_head=True)


def test_what_a_batch_may_hold():
    model, batch = kit.fused_model("mixtral"), kit.pair_batch()
    with packed(PackedForward(model, "padding_free")):
        with pytest.raises(ValueError, match="expected the keywords input_ids, .* of a text batch, got .*pixel_values"):
            model(**batch, pixel_values=torch.zeros(1), fused_lm_head=True)
        with pytest.raises(ValueError, match="padding_free: expected the keywords .* and 1 without a keyword"):
            model(batch["input_ids"], fused_lm_head=True)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits.shape == (8, 14, kit.VOCAB), "without the fused head, the model's own forward"
    with (
        packed(PackedForward(model, "shared_prompt")),
        pytest.raises(ValueError, match="shared_prompt: the load-balancing loss .* expected router_aux_loss_coef=0"),
    ):
        model(**batch, fused_lm_head=True, output_router_logits=True)


def test_the_routers_loss_counts_the_same_tokens():
    model, batch = kit.fused_model("mixtral"), kit.pair_batch()
    with patched():
        padded = model(**batch, fused_lm_head=True, output_router_logits=True)
        with packed(PackedForward(model, "padding_free")):
            row = model(**batch, fused_lm_head=True, output_router_logits=True)
    assert padded.aux_loss > 0
    torch.testing.assert_close(row.aux_loss, padded.aux_loss)
    torch.testing.assert_close(row.loss, padded.loss)


def test_packed_nests_and_restores_after_an_error():
    model = kit.fused_model("llama")
    own, one = model.forward, PackedForward(model, "padding_free")
    with packed(one), packed(one):
        assert model.forward is one and one.inner == own
    assert model.forward == own
    with pytest.raises(KeyError), packed(one):
        raise KeyError
    assert model.forward == own
    plain = kit.transformers.AutoModelForCausalLM.from_config(model.config)
    with packed(PackedForward(plain, "padding_free")):
        assert isinstance(plain.forward, forward.PackedForward)
    assert "forward" not in vars(plain)
