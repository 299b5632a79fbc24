"""Promises of how a batch goes through the encoder: packed, padded, in parts and again, with the same vectors and gradients."""

import dataclasses
import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import TINY_TEXT
from test_encoder import ITEMS
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig

from datamodules.processors.inputs import Inputs
from datamodules.processors.passes import packs_of, passes_of, split_into
from datamodules.sample import Item, Part
from lightning_modules.encoder import packing
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, EncoderConfig, probe
from lightning_modules.sharded import shard, whole

NO_PADDING = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
FAMILIES = {
    "qwen3": {},
    "gemma3_text": {"sliding_window": 6, "num_hidden_layers": 3},
    "mistral": {"sliding_window": 6},
    "llama": {},
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "electra": {},
    "modernbert": {**NO_PADDING, "cls_token_id": 1, "sep_token_id": 1, "local_attention": 8},
}


def texts(*lengths: int, seed: int = 0) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    return Inputs(torch.randint(2, 300, (sum(lengths),), generator=random), torch.tensor(lengths))


def encoder_of(family: str = "qwen3", **fields) -> Embedder:
    torch.manual_seed(0)
    known = AutoConfig.for_model(family)
    text = {name: value for name, value in TINY_TEXT.items() if hasattr(known, name)}
    text |= {**FAMILIES[family], **fields, "model_type": family}
    encoder = Embedder(EncoderConfig(BackboneConfig(text=text), embedding_dim=16, prefixes=(16,))).eval()
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return encoder


def vectors_and_gradients(encoder: Embedder, inputs: Inputs, compute: ComputeConfig) -> list[torch.Tensor]:
    """Under one seed, for what is drawn at random."""
    encoder.use(compute)
    encoder.zero_grad()
    torch.manual_seed(1)
    vectors = encoder(inputs)
    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
    torch.rand(1)
    return [vectors.detach(), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    largest = max(float(one.abs().max()) for one in expected[1:])
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * largest)


def apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Between two gradients, as a share of their length."""
    one, other = (torch.cat([gradient.flatten() for gradient in whole[1:]]) for whole in (found, expected))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_padded_is_cached(family):
    encoder, inputs = encoder_of(family), texts(3, 9, 1, 9, 20, 5, 3, 12)
    expected = vectors_and_gradients(encoder, inputs, ComputeConfig("padded", pass_cost=10**6))
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []
    assert encoder.parts(inputs.lengths.numpy())[0].places == 8 * 20
    assert encoder.padding == pytest.approx(1 - 62 / 160)
    for compute in (
        ComputeConfig(),
        ComputeConfig("padded", pass_cost=4),
        ComputeConfig("packed", max_tokens=20),
        ComputeConfig("padded", max_tokens=20),
        ComputeConfig(checkpoint_layers=True, max_tokens=20),
    ):
        found = vectors_and_gradients(encoder, inputs, compute)
        assert_same(found, expected)
        assert apart(found, expected) < 1e-6
        assert encoder.packed == (compute.layout != "padded")
        probe(encoder)


def test_equal_items_go_through_once(processor, tiny_encoder, monkeypatch):
    twice = [*ITEMS, *ITEMS[::-1], ITEMS[1]]
    inputs, numbers = processor(twice), []
    forward = tiny_encoder.backbone.forward
    monkeypatch.setattr(tiny_encoder.backbone, "forward", lambda i, **k: numbers.append(len(i)) or forward(i, **k))
    expected = vectors_and_gradients(tiny_encoder, dataclasses.replace(inputs, digests=None), ComputeConfig())
    assert_same(vectors_and_gradients(tiny_encoder, inputs, ComputeConfig()), expected)
    assert numbers == [len(twice), len(ITEMS)]
    for part in (Inputs.join([inputs.rows(np.arange(4)), inputs.rows(np.arange(4, 11))]), inputs):
        one, which = part.distinct()
        assert which.tolist() == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0, 1]
        assert len(one) == 5


def test_items_whose_media_alone_differ_are_not_equal(processor):
    black, white = (np.full((8, 8, 3), value, np.uint8) for value in (0, 255))
    inputs = processor([Item((Part("image", b"x", "png", content=content),)) for content in (black, white, black)])
    assert len(set(inputs.token_ids.view(3, -1).unique(dim=0))) == 1
    assert inputs.distinct()[1].tolist() in ([0, 1, 0], [1, 0, 1])


def test_equal_items_meet_random_numbers_of_their_own(processor):
    encoder = encoder_of("bert", hidden_dropout_prob=0.3)
    assert encoder.draws
    items = [Item((Part("text", "the cat", content="the cat"),))] * 2
    with torch.no_grad():
        assert not torch.allclose(*encoder.train()(processor(items)), atol=1e-3)
        assert torch.equal(*encoder.eval()(processor(items)))
    assert encoder_of("bert").draws  # its own defaults
    assert not encoder_of("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).draws


def test_media_go_through_in_parts_too(tiny_encoder, processor):
    inputs = processor(ITEMS)
    expected = vectors_and_gradients(tiny_encoder, inputs, ComputeConfig("padded", pass_cost=10**6))
    for compute in (ComputeConfig(), ComputeConfig(max_tokens=60), ComputeConfig("padded", max_tokens=60)):
        assert_same(vectors_and_gradients(tiny_encoder, inputs, compute), expected)
    assert len(tiny_encoder.parts(inputs.lengths.numpy())) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_activations_made_again_meet_the_same_random_numbers(dtype, checkpoint_layers):
    encoder, inputs = (
        encoder_of("bert", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.3).train(),
        texts(*range(1, 12)),
    )
    whole = vectors_and_gradients(encoder, inputs, ComputeConfig())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        runs = {}
        for again in (False, True):  # the same parts, kept or not
            compute = ComputeConfig(max_tokens=20, checkpoint_layers=checkpoint_layers and again)
            encoder.use(compute)
            parts = [part._replace(again=again) for part in encoder.parts(inputs.lengths.numpy())]
            encoder.parts = lambda lengths, parts=parts: parts
            runs[again] = vectors_and_gradients(encoder, inputs, compute)
    assert len(parts) > 3
    assert_same(runs[True], runs[False], 1e-6)
    assert not torch.allclose(runs[True][0], whole[0], atol=1e-2)  # dropout is on: other parts draw other numbers


def test_only_the_last_parts_are_kept():
    encoder = encoder_of()
    lengths = np.array([5] * 10)
    for most, again in ((None, [False]), (50, [False]), (49, [True, False]), (25, [True, False]), (20, [True, True, False])):
        encoder.use(ComputeConfig(max_tokens=most))
        parts = encoder.parts(lengths)
        assert [part.again for part in parts] == again
        assert most is None or all(part.places <= most for part in parts)
        assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == list(range(10))


def test_memory_does_not_grow_with_the_batch():
    """Each step in a process of its own; whole, four times the batch takes about four times the memory."""
    peaks: dict[str, list[float]] = {}
    for way, pairs in itertools.product(("whole", "in parts"), ("32", "128")):
        command = [sys.executable, "experiments/bench/memory.py", "--tokens", "512", "--one", way, pairs]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True, text=True)
        peaks.setdefault(way, []).append(json.loads(done.stdout.splitlines()[-1])["MiB"])
    assert peaks["whole"][1] > 2.5 * peaks["whole"][0]
    assert peaks["in parts"][1] < 1.3 * peaks["in parts"][0] + 5
    assert peaks["in parts"][1] < peaks["whole"][1] / 4


def test_nothing_is_made_again_without_gradients(monkeypatch):
    encoder, calls = encoder_of(), []
    encoder.use(ComputeConfig(max_tokens=10))
    forward = encoder.backbone.forward
    monkeypatch.setattr(encoder.backbone, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    with torch.no_grad():
        encoder(texts(5, 5, 5, 5))
    assert len(calls) == 2
    encoder(texts(5, 5, 5, 5)).sum().backward()
    assert len(calls) == 5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(0, 200), st.one_of(st.none(), st.integers(1, 200)))
def test_every_row_is_in_one_part_within_the_limit(lengths, pass_cost, most):
    sizes = np.array(lengths)
    for parts, places in (
        (passes_of(sizes, pass_cost, most), lambda rows: sizes[rows].max() * len(rows)),
        (packs_of(sizes, most), lambda rows: sizes[rows].sum()),
    ):
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
        assert [int(n) for n in sizes[np.concatenate(parts)]] == sorted(lengths)
        assert all(most is None or places(rows) <= most or len(rows) == 1 for rows in parts)
        number = min(len(lengths), len(parts) + 3)
        finer = split_into(parts, number)
        assert len(finer) == number
        assert np.concatenate(finer).tolist() == np.concatenate(parts).tolist()
    with pytest.raises(ValueError, match="items cannot go through the encoder in the"):
        split_into(passes_of(sizes), len(lengths) + 1)


def test_the_last_pack_is_full():
    """It alone does not go through a second time: what is left over goes first."""
    packs = packs_of(np.array([4, 4, 4, 5, 4]), 9)
    assert [pack.tolist() for pack in packs] == [[0], [1, 2], [4, 3]]


def test_passes_are_the_cheapest_cut():
    """Against every way to cut seven lengths."""
    sizes, cost = np.array([3, 4, 4, 9, 10, 30, 31]), 7
    cheapest = min(
        sum(sizes[start:stop].max() * (stop - start) + cost for start, stop in zip((0, *cuts), (*cuts, 7), strict=True))
        for number in range(7)
        for cuts in itertools.combinations(range(1, 7), number)
    )
    assert sum(sizes[rows].max() * len(rows) + cost for rows in passes_of(sizes, cost)) == cheapest


def test_what_cannot_be_packed_is_padded_or_refused():
    config = BackboneConfig(text=dict(TINY_TEXT), attention="eager")
    eager = Embedder(EncoderConfig(config, embedding_dim=16, prefixes=(16,)))
    assert not eager.packed
    with pytest.raises(ValueError, match="attends by 'eager', which cannot be packed"):
        eager.use(ComputeConfig("packed"))
    with pytest.raises(ValueError, match=r"compute\.compile needs compute\.layout=padded"):
        ComputeConfig("packed", compile=True)
    with pytest.raises(ValueError, match=r"compute\.max_tokens is 0"):
        ComputeConfig(max_tokens=0)


def test_the_varlen_kernel_is_called_as_torch_describes_it(monkeypatch):
    """A stand-in of the signature that torch has, item by item: there is no such kernel on a CPU."""
    signature = inspect.signature(packing.varlen_attn)

    def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        signature.bind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)
        assert cu_seq_q.dtype == torch.int32
        assert max_q == cu_seq_q.diff().max()
        lengths = cu_seq_q.diff().tolist()
        outs = []
        for parts in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
            items = [x.transpose(0, 1)[None] for x in parts]
            mask = packing._within(options.get("window_size", (None,))[0], items[0].shape[2], query.device)
            outs.append(F.scaled_dot_product_attention(*items, attn_mask=mask, scale=options["scale"])[0].transpose(0, 1))
        return torch.cat(outs)

    for family in ("qwen3", "gemma3_text", "bert"):
        encoder, inputs = encoder_of(family), texts(3, 9, 9, 20)
        expected = vectors_and_gradients(encoder, inputs, ComputeConfig())
        with monkeypatch.context() as patched:
            patched.setattr(packing, "varlen_attn", varlen)
            patched.setattr(packing, "_has_varlen", lambda query, dropout: True)
            assert_same(vectors_and_gradients(encoder, inputs, ComputeConfig()), expected)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def reduced_by_ddp(inputs: Inputs, most: int | None) -> tuple[int, list[torch.Tensor]]:
    """How many buckets were reduced in a step, and the gradients."""
    encoder, reduced = encoder_of(), []
    encoder.use(ComputeConfig(max_tokens=most))

    def count(state, bucket):
        reduced.append(bucket)
        return default_hooks.allreduce_hook(state, bucket)

    wrapped = DistributedDataParallel(encoder)
    wrapped.register_comm_hook(None, count)
    wrapped(inputs).sum().backward()
    return len(reduced), [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]


def reduced_by_fsdp(inputs: Inputs, most: int | None, mesh: DeviceMesh) -> tuple[int, list[torch.Tensor]]:
    encoder, reduced, reduce = encoder_of(), [], _fsdp_param_group.foreach_reduce
    encoder.use(ComputeConfig(max_tokens=most))
    shard(encoder, encoder.backbone.layers, mesh)

    def count(*arguments, **more):
        reduced.append(arguments)
        return reduce(*arguments, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_fsdp_param_group, "foreach_reduce", count)
        encoder(inputs).sum().backward()
    return len(reduced), [whole(parameter.grad) for parameter in encoder.parameters() if parameter.grad is not None]


def test_gradients_are_reduced_once_however_many_parts(one_rank):
    inputs = texts(3, 9, 9, 20, 5, 12, 30, 2)
    num_buckets, expected = reduced_by_ddp(inputs, None)
    num_groups, _ = reduced_by_fsdp(inputs, None, one_rank)
    assert num_groups == 3  # two layers and the rest
    for number, reduced in ((num_buckets, reduced_by_ddp(inputs, 20)), (num_groups, reduced_by_fsdp(inputs, 20, one_rank))):
        assert reduced[0] == number
        for one, other in zip(reduced[1], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_probe_refuses_to_pack_what_leaks_from_item_to_item(monkeypatch):
    encoder = encoder_of()
    layer = encoder.backbone.text.layers[0]
    forward = layer.forward

    def mixes(states, *arguments, **more):
        return forward(states + 0.1 * F.pad(states, (0, 0, 1, 0))[:, :-1], **more)

    monkeypatch.setattr(layer, "forward", mixes)
    with pytest.raises(ValueError, match="or cannot be packed"):
        probe(encoder)
    encoder.use(ComputeConfig("padded"))
    probe(encoder)


@pytest.mark.parametrize("change", [{"softcap": 50.0}, {"position_bias": torch.zeros(1)}])
def test_scores_that_a_model_changes_are_not_packed(change):
    states = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="changes its attention scores"):
        packing.attend(None, states, states, states, None, packed_lengths=torch.tensor([2, 3]), **change)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at all of them
def test_a_compiled_text_model_gives_the_same_vectors():
    encoder, inputs = encoder_of(), texts(3, 9, 9, 20, 12)
    expected = vectors_and_gradients(encoder, inputs, ComputeConfig("padded"))
    assert_same(vectors_and_gradients(encoder, inputs, ComputeConfig(compile=True)), expected)
    assert not encoder.packed
