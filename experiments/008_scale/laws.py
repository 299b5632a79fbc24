"""The laws of a step, of memory and of checkpoints, with the machine and the models that they are asked of; see scale.py.

Laws that say "counted" were counted in a step of two processes (counted.py). Whatever else is not read off the code is a
constant here, with where it comes from. Bytes are those that one GPU receives, times are seconds, memory is of one GPU.
Letters: G pairs of a step on all ranks, W ranks, D the embedding's width, L parameters of the text model's layers.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

GIB, DAY = 2**30, 86_400.0
NUM_PAIRS, BATCHES, GPUS, WIDTH, PREFIXES = 10**9, (16_384, 32_768, 65_536), (64, 128, 256, 512), 3072, (768, 1536, 3072)

# The machine. NVIDIA's data sheets of H100 SXM and H200 SXM (nvidia.com/en-us/data-center/h100, ../h200): dense, no sparsity.
BF16_PEAK, FP32_PEAK = 989e12, 67e12  # FLOP/s; fp32 without tensor cores: nothing here sets another matmul precision
HBM = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s
MEMORY = {"H100": 79 * GIB, "H200": 139 * GIB}  # what torch sees of 80 and 141 GB
USABLE = 0.92  # of it; our choice: CUDA's context, NCCL's buffers, fragments
GPUS_PER_NODE = 8  # HGX; NVLink 900 GB/s both ways together, 400 Gb/s of network a GPU
NVLINK_BUS = 370e9  # bytes/s of a ring within a node, of 450e9: github.com/NVIDIA/nccl-tests/issues/212
# Bus bandwidth of reduce-scatter by nodes of 8 H100, measured: github.com/NVIDIA/nccl/issues/1229 (all-gather 3 % less: 1281).
BUS = {2: 365e9, 4: 360e9, 8: 345e9, 16: 320e9, 32: 300e9, 64: 280e9, 128: 260e9}
# Latencies in seconds of NCCL's own model (src/graph/tuning.cc, version 2.12): start, step by NVLink, step by network.
RING = {"Simple": (8.4e-6, 3.4e-6, 9.6e-6, 1.0), "LL128": (10e-6, 1.9e-6, 4.0e-6, 0.92)}  # the last: share of the bandwidth
TREE = (4.4e-6, 0.94e-6, 5.0e-6)
HBM_SHARE = 0.8  # of the peak that element-wise kernels reach; our choice
FP32_SHARE = 0.75  # of the peak that fp32 products reach; our choice
# Share of the bf16 peak that the encoder's own kernels reach, recomputation counted as work. torchtitan's 8 B with FSDP2 trains
# at 33 % (39 % compiled) on 8 and on 128 H100, waiting included (its benchmarks/llama3_h100_202412_torchtitan.md),
# Megatron Core at up to 47 %. A model 640 wide is bound by memory in eager mode: 20 % is our choice, and so is the 40 %.
EFFICIENCY = {"740 M": 0.20, "8 B": 0.40}
CLUSTER_READ = CLUSTER_WRITE = 100e9  # bytes/s of shared storage, all clients together; our choice
CLIENT = 2e9  # bytes/s of one process writing or reading a file of its own; our choice
METADATA = 1e5  # stat calls a second of shared storage; our choice
HASH = 1.44e9  # bytes/s of SHA-256 in a process: 92 MB of tables in 0.064 s, ../bench/stream_cpu.json

# The code, counted (counted.py) or read.
COUNTED = json.loads(Path(__file__).with_name("counted.json").read_text())
GATHERS_A_PART = 2  # counted: each part gathers every layer going forward and again going backward, in fp32
PASSES = COUNTED["objective"]["passes"]  # 92 reads and writes of (G, D) fp32 beside the loss's kernel, health among them
CHUNK_PASSES = 4  # of (G, D) fp32 in each chunk of 128 rows of the loss: kernels.chunked
CHUNK_ROWS = 128  # kernels.chunked, for G above 5,461
SCORE_PASSES = 26  # reads and writes of the scores at every prefix: kernels.chunked, eleven passes and the mask
VECTORS_ALIVE = COUNTED["objective"]["alive"]  # 6 tensors of (G, D) fp32 at once
SMALL_COLLECTIVES = 8  # sizes, ids, means, parts twice, guard, norm of the gradient, clock: read
HASHES_OF_SAVING, HASHES_OF_RESUMING = 2, 2  # while written and of the file; of the folder and of each file: read
EVERY_MINUTES = 30.0  # lightning_modules.checkpoints
EXAMPLE_ROW, MEMBER_ROW, KEY = 36, 22, 16  # bytes: datamodules.index; the key's length is our choice
SHARD_ENTRY = len(json.dumps({"name": "0" * 10, "num_examples": 1000, "bytes": 10**6, "sha256": "0" * 64}, indent=1)) + 16
MAX_MANIFEST, EXAMPLES_PER_SHARD = 2**28, 1000  # datamodules.shards
FEISTEL = 14.5e-3 / 65_536  # seconds an example of 10⁹, measured here on a busy core; AMD EPYC
PAGE = 4096  # bytes that a read of a mapped table fetches at least
FAILURES = 419 / (54 * DAY * 16_384)  # a GPU and second: Llama 3's 54 days on 16,384 H100 (arXiv 2407.21783, table 5)
RESTART = 15 * 60.0  # seconds to notice (NCCL waits 10 minutes), requeue and import; our choice
BYTES_OF_TOKEN = json.loads((Path(__file__).parents[1] / "bench" / "fits.json").read_text())["bytes"]  # a layer's activations


@dataclass(frozen=True)
class Stack:
    """Layers of a transformer; widths as in ../bench/fits.py."""

    hidden: int
    mlp: int
    queries: int
    keys: int
    layers: int

    @property
    def parameters(self) -> int:
        return self.layers * (2 * self.hidden * (self.queries + self.keys) + 3 * self.hidden * self.mlp)

    def activations(self, tokens: float, *, checkpointed: bool) -> float:
        """Bytes kept for the backward pass: ../bench/fits.py."""
        widths = (1, self.hidden, self.mlp, self.queries, self.keys)
        layer = sum(size * width for size, width in zip(BYTES_OF_TOKEN, widths, strict=True)) * tokens
        return self.layers * 4 * self.hidden * tokens + layer if checkpointed else self.layers * layer

    def attention(self, length: int) -> float:
        """FLOPs of all pairs of an item's tokens, forward and backward, scores made twice (counted: 14)."""
        return 14.0 * self.layers * self.queries * length**2


VISION = Stack(768, 3072, 768, 768, 16)  # Gemma 4's, whose 167 M the recipe's 740 M hold; transformers' defaults
VISION_PARAMETERS, AUDIO_PARAMETERS = 167e6, 305e6  # ../../shared/design/recipe.md, EG2
PATCHES = 9  # of a picture for each of its tokens: Gemma 4's pooling of 3 x 3


@dataclass(frozen=True)
class Model:
    """An encoder: a text model's shape, its vocabulary, EmbeddingGemma 2's towers, one projection."""

    name: str
    text: Stack
    vocab: int

    @property
    def rest(self) -> float:
        return self.vocab * self.text.hidden + VISION_PARAMETERS + AUDIO_PARAMETERS + self.text.hidden * WIDTH

    @property
    def parameters(self) -> float:
        return self.text.parameters + self.rest


SMALL = Model("740 M", Stack(640, 2048, 1024, 256, 18), 262_144)  # Gemma 3 270M's text model
LARGE = Model("8 B", Stack(4096, 12_288, 4096, 1024, 36), 151_936)  # Qwen3 8B's, with the same towers (our choice)


@dataclass(frozen=True)
class Kind:
    """Pairs of one kind. Lengths are our choice within the recipe's limits: 280 tokens an image, 140 a frame, 25 a second.

    Args:
        lengths: Tokens of query and target.
        patches: Of pictures, and how many of them attend to each other.
        sound: Tokens of the audio tower.
        stored: Bytes of a pair in a shard, tar's headers included.
        members: Files of a pair.
        a_core: Pairs a second that a core reads, decodes and tokenises.
    """

    name: str
    lengths: tuple[int, int]
    stored: float
    members: int
    a_core: float
    patches: int = 0
    patch_group: int = 2520
    sound: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def flops(self, model: Model) -> float:
        """Of a pair, forward and backward, nothing made twice but attention's scores."""
        text = 6 * model.text.parameters * self.tokens + sum(map(model.text.attention, self.lengths))
        towers = 6 * (VISION_PARAMETERS * self.patches + AUDIO_PARAMETERS * self.sound)
        views = self.patches / self.patch_group
        return text + towers + views * VISION.attention(self.patch_group) + 2 * 6 * model.text.hidden * WIDTH


# Cores: ../bench/README.md at 4 bytes a token (text 6.6 MB/s) and 5 s a clip (sound 315/s); measured here for an 896 x 720 JPEG
# (4.2 ms) and 16 s of 640 x 360 H.264 (115 ms), decoding alone.
TEXT = Kind("text", (64, 256), 320 * 4 + 768, 1, 6.6e6 / (320 * 4))
IMAGE = Kind("image", (64, 280), 120e3, 2, 240.0, patches=280 * PATCHES)
VIDEO = Kind("video, 16 frames", (64, 16 * 140), 1e6, 2, 8.7, patches=16 * 140 * PATCHES, patch_group=140 * PATCHES)
AUDIO = Kind("audio, 10 s", (64, 250), 80e3, 2, 315 / 2, sound=250)
KINDS = (TEXT, IMAGE, VIDEO, AUDIO)


@dataclass(frozen=True)
class Layout:
    """How a step runs.

    Args:
        sharded: FSDP2; else DDP.
        parts: That a rank's batch goes through the encoder in.
        checkpointed: Whether layers keep their inputs alone.
        mended: FSDP2 as it could be: it casts to bf16 before it gathers (counted), and each part goes backward by itself, its
            gradients reduced and its layers given back before the next (not counted).
    """

    sharded: bool
    parts: int
    checkpointed: bool
    mended: bool = False

    @property
    def recompute(self) -> float:
        """Work over that of one forward and one backward pass: a forward pass is a third."""
        again = self.parts - (0 if self.mended and self.parts > 1 else 1)
        return 1 + again / self.parts / 3 + self.checkpointed / 3


def bus(gpus: int) -> float:
    """Bytes a second of a large ring; beyond 128 nodes as with 128, which is kind."""
    nodes = gpus // GPUS_PER_NODE
    return NVLINK_BUS if nodes <= 1 else BUS[min(128, 2 ** max(1, round(math.log2(nodes))))]


def ring(size: float, gpus: int) -> float:
    """Seconds of an all-gather or reduce-scatter whose whole is `size` bytes: the better of NCCL's two protocols."""
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / GPUS_PER_NODE)
    moved = size * (gpus - 1) / gpus
    return min(
        start + (gpus - nodes) * near + (nodes - 1) * far + moved / bus(gpus) / share
        for start, near, far, share in RING.values()
    )


def tree(gpus: int) -> float:
    """Seconds of a collective of a few bytes."""
    start, near, far = TREE
    return start + 2 * ((GPUS_PER_NODE - 1) * near + math.log2(max(1, gpus / GPUS_PER_NODE)) * far)


def memory(model: Model, kind: Kind, gpus: int, batch: int, layout: Layout) -> dict[str, float]:
    """Bytes by what holds them (counted.py for what FSDP2 keeps whole)."""
    layers, rest, one = model.text.parameters, model.rest, model.text.parameters / model.text.layers
    tokens = batch / gpus / layout.parts * kind.tokens
    patches = batch / gpus / layout.parts * kind.patches
    several = layout.parts > 1 and not layout.mended
    wide = 2 if layout.mended else 4
    whole, gradients = 0.0, 2 * layers if several else 0.0  # in bf16, until the last part's backward pass is over
    if layout.sharded:
        whole = wide * (rest + (layers if several else 2 * one))
        gradients = 4 * rest + (2 * layers if several else 2 * one)
    return {
        "weights, gradients, moments": (16 / gpus if layout.sharded else 20) * model.parameters,  # DDP has buckets of 4
        "weights made whole": whole,
        "gradients made whole": gradients,
        "bf16 casts": 0.0 if layout.mended else 2 * layers,
        "activations": model.text.activations(tokens, checkpointed=layout.checkpointed)
        + VISION.activations(patches, checkpointed=layout.checkpointed),
        "vectors": VECTORS_ALIVE * batch * WIDTH * 4,
        "loss": 2 * len(PREFIXES) * CHUNK_ROWS * batch * 4,
    }


@dataclass(frozen=True)
class Step:
    """A step's seconds by what takes them, and bytes that a GPU receives."""

    seconds: dict[str, float]
    bytes: dict[str, float]
    beside: float  # seconds of collectives that run beside the encoder, of which only what is longer is waited for

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def share(self, *names: str) -> float:
        return sum(self.seconds[name] for name in names) / self.total


def step_of(model: Model, kind: Kind, gpus: int, batch: int, layout: Layout, gpu: str = "H100") -> Step:
    """A step. Collectives of layers run beside the encoder's work, those of the rest, of vectors and of numbers do not."""
    layers, rest, parts = model.text.parameters, model.rest, layout.parts
    rows, vectors, one = batch / gpus, batch * WIDTH * 4, 4 * model.text.parameters / model.text.layers
    once = kind.flops(model) * rows / (EFFICIENCY[model.name] * BF16_PEAK)
    encoder = once * layout.recompute
    if layout.sharded:
        wide, gathers, reductions = 4, GATHERS_A_PART * parts, 1
        if layout.mended:
            wide, gathers, reductions = 2, 3 * parts if parts > 1 else 2, parts
        beside = model.text.layers * (gathers * ring(one * wide / 4, gpus) + reductions * ring(one, gpus))
        waiting = max(0.0, beside - encoder) + ring(wide * rest, gpus) + ring(4 * rest, gpus)
        weights, gradients = gathers * wide * layers + wide * rest, 4 * (reductions * layers + rest)
    else:
        beside = 2 * ring(4 * model.parameters, gpus)
        waiting = max(0.0, beside - once * 2 / 3 / parts)
        weights, gradients = 0.0, 2 * 4 * model.parameters
    scores = len(PREFIXES) * rows * batch * 4 * SCORE_PASSES / (HBM_SHARE * HBM[gpu])
    passes = PASSES + CHUNK_PASSES * math.ceil(rows / CHUNK_ROWS)
    seconds = {
        "encoder": encoder,
        "weights and gradients": waiting,
        "vectors on the wire": 2 * ring(2 * vectors, gpus),
        "passes over all vectors": passes * vectors / (HBM_SHARE * HBM[gpu]),
        "loss": 6 * rows * batch * WIDTH / (FP32_SHARE * FP32_PEAK) + scores,
        "small collectives": SMALL_COLLECTIVES * tree(gpus),
        "optimiser": (28 / gpus if layout.sharded else 28) * model.parameters / (HBM_SHARE * HBM[gpu]),
    }
    share = (gpus - 1) / gpus
    moved = {"vectors": 4 * vectors * share, "weights": weights * share, "gradients": gradients * share}
    return Step(seconds, moved, beside)


@cache
def layouts(model: Model, kind: Kind, gpus: int, batch: int, gpu: str, *, mended: bool = False) -> list[Layout]:
    """What fits: FSDP2 and DDP, layers checkpointed or not, each in the fewest parts."""
    found = []
    for sharded, checkpointed in [(True, False), (True, True)] + [(False, False), (False, True)] * (not mended):
        for parts in range(1, batch // gpus + 1):
            layout = Layout(sharded, parts, checkpointed, mended)
            if sum(memory(model, kind, gpus, batch, layout).values()) <= USABLE * MEMORY[gpu]:
                found.append(layout)
                break
    return found


def best(model: Model, kind: Kind, gpus: int, batch: int, gpu: str, *, mended: bool = False) -> tuple[Layout, Step] | None:
    """The fastest that fits; None where nothing does."""
    fitting = layouts(model, kind, gpus, batch, gpu, mended=mended)
    steps = [(layout, step_of(model, kind, gpus, batch, layout, gpu)) for layout in fitting]
    return min(steps, key=lambda found: found[1].total, default=None)


def spread_out(batch: int) -> float:
    """Seconds of the spread-out term, which every rank makes of all vectors by D x D products in fp32."""
    return 2 * 6 * batch * sum(width**2 for width in PREFIXES) / (FP32_SHARE * FP32_PEAK)


def checkpoint(model: Model, gpus: int, *, sharded: bool) -> tuple[float, float, float, float]:
    """Bytes; seconds to write; seconds to go on from it; bytes of a node's memory while it is put together."""
    size = 12 * model.parameters
    own = size / gpus if sharded else size
    write = max(own / CLIENT, size / CLUSTER_WRITE) + (HASHES_OF_SAVING if sharded else 1) * own / HASH
    read = max(size / CLIENT, gpus * size / CLUSTER_READ)
    resume = read + (HASHES_OF_RESUMING if sharded else 1) * size / HASH
    return size, write, resume, (2 if sharded else 1) * GPUS_PER_NODE * size
