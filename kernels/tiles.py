"""The Triton kernels of the contrastive loss; `kernels.fused` launches them, `kernels.chunked` is their specification.

No atomics: every sum has one owner, or is a sum of partial sums in a fixed order, so runs repeat bit for bit. Products take the
dtype of the vectors and accumulate in fp32; E = e^L and the weights W of the gradient products are stored in bf16 (fp32 for
fp32 vectors), logits never. Strides are 1 in the last dimension; what could pass 2³¹ elements is addressed in int64.
Coordinates come in blocks padded to BLOCK_K, so no step crosses a prefix edge.
"""

import triton
import triton.language as tl

BLOCK_M = 128  # rows of a tile of scores
BLOCK_N = 128  # columns of a tile of scores; its two halves leave the registers one after the other
BLOCK_K = 64  # coordinates of a step
HALF_N = BLOCK_N // 2
MASKED = tl.constexpr(-1e30)  # far below any dot product of rows in the safe range


@triton.jit
def prologue(
    x, y, norm, dots, edges,
    num_rows, width, num_prefixes, first_y,
    HAS_Y: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Norm of every prefix of every row, and its dot product with a row of y.

    A program owns BLOCK_R rows and walks over all coordinates once; sums in fp32, in order of the coordinates.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = rows < num_rows
    x_row = x + rows.to(tl.int64)[:, None] * width
    y_row = y + (rows + first_y).to(tl.int64)[:, None] * width
    square = tl.zeros((BLOCK_R,), tl.float32)
    dot = tl.zeros((BLOCK_R,), tl.float32)
    start = 0
    for k in range(num_prefixes):
        stop = tl.load(edges + k)
        for column in range(start, stop, BLOCK_C):
            columns = column + tl.arange(0, BLOCK_C)[None, :]
            inside = valid[:, None] & (columns < stop)
            x_tile = tl.load(x_row + columns, inside, other=0.0).to(tl.float32)
            square += tl.sum(x_tile * x_tile, 1)
            if HAS_Y:
                dot += tl.sum(x_tile * tl.load(y_row + columns, inside, other=0.0).to(tl.float32), 1)
        at = k * num_rows + rows
        tl.store(norm + at, tl.sqrt(square), valid)
        if HAS_Y:
            tl.store(dots + at, dot, valid)
        start = stop


@triton.jit
def _leave(
    dot, half, k, rows, columns,
    weight, tile_max, tile_sum, scale_row, own_row, inverse_column, limit,
    num_columns, num_tiles, rows_padded, columns_padded, HAS_MARGIN: tl.constexpr,
):  # fmt: skip
    """One half of a tile at a prefix edge: E relative to the row's largest exponent, that exponent, and the row's sum."""
    column = tl.load(inverse_column + k * num_columns + columns, columns < num_columns, other=1.0)
    excess = tl.where(dot < MASKED / 2, MASKED, dot * column[None, :] * scale_row[:, None] - own_row[:, None])
    if HAS_MARGIN:
        excess = tl.where(excess > tl.load(limit), MASKED, excess)
    largest = tl.max(excess, 1)
    e = tl.exp2(excess - largest[:, None])  # pyright: ignore[reportCallIssue, reportArgumentType] (tl.max has no return type)
    at = (k * num_tiles + half) * rows_padded + rows
    tl.store(tile_max + at, largest)
    tl.store(tile_sum + at, tl.sum(e, 1))
    place = (k * rows_padded + rows).to(tl.int64)[:, None] * columns_padded + columns[None, :]
    tl.store(weight + place, e.to(weight.dtype.element_ty))


@triton.jit
def scores(
    query, column, weight, tile_max, tile_sum,
    scale, own, inverse_column, limit, edges,
    query_id, passage_id, negative_row, negative_id,
    first_row, num_rows, chunk_rows, num_passages, num_columns, offset,
    width, num_tiles, rows_padded, columns_padded,
    HAS_QUERY_ID: tl.constexpr, HAS_PASSAGE_ID: tl.constexpr, SEE_ALL: tl.constexpr, HAS_NEGATIVE_ID: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """E = e^(L − largest of its half tile) of every prefix, in one pass over the coordinates.

    A program owns BLOCK_M rows by BLOCK_N columns, accumulates their dot products in fp32 in order of the coordinates, and
    writes at each prefix edge. The accumulator of a pair that the row does not see starts at MASKED; an L beyond `limit`
    becomes MASKED as it leaves.
    """
    tiles_m, tiles_n = rows_padded // BLOCK_M, columns_padded // BLOCK_N
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + program % (GROUP * tiles_n) % group_rows
    tile_n = program % (GROUP * tiles_n) // group_rows

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.where(rows < chunk_rows, first_row + rows, 0)
    is_passage = columns < num_passages
    masked = (row + offset)[:, None] == columns[None, :]
    masked |= (columns >= num_columns)[None, :]
    if HAS_QUERY_ID:
        row_id = tl.load(query_id + offset + row)
        column_id = tl.load(query_id + columns, is_passage, other=0)
        masked |= (row_id[:, None] == column_id[None, :]) & is_passage[None, :]
    if HAS_PASSAGE_ID:
        row_id = tl.load(passage_id + offset + row)
        column_id = tl.load(passage_id + columns, is_passage, other=0)
        masked |= (row_id[:, None] == column_id[None, :]) & is_passage[None, :]
    if SEE_ALL:
        is_negative = (columns >= num_passages) & (columns < num_columns)
        owner = tl.load(negative_row + columns - num_passages, is_negative, other=-1)
        masked |= row[:, None] == owner[None, :]
        if HAS_NEGATIVE_ID:
            row_id = tl.load(passage_id + offset + row)
            column_id = tl.load(negative_id + columns - num_passages, is_negative, other=0)
            masked |= (row_id[:, None] == column_id[None, :]) & is_negative[None, :]
    dot = tl.where(masked, MASKED, 0.0)

    steps = tl.arange(0, BLOCK_K)
    query_tile = query + row.to(tl.int64)[:, None] * width + steps[None, :]
    column_tile = column + tl.where(columns < num_columns, columns, 0).to(tl.int64)[None, :] * width + steps[:, None]
    k = 0
    edge = tl.load(edges)
    for step in range(0, width, BLOCK_K):
        dot = tl.dot(tl.load(query_tile + step), tl.load(column_tile + step), dot, input_precision="ieee")
        if step + BLOCK_K == edge:
            at = k * num_rows + row
            scale_row, own_row = tl.load(scale + at), tl.load(own + at)
            first, second = tl.split(tl.permute(tl.reshape(dot, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            low = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
            _leave(
                first, 2 * tile_n, k, rows, low, weight, tile_max, tile_sum, scale_row, own_row, inverse_column,
                limit, num_columns, num_tiles, rows_padded, columns_padded, HAS_MARGIN,
            )  # fmt: skip
            _leave(
                second, 2 * tile_n + 1, k, rows, low + BLOCK_N // 2, weight, tile_max, tile_sum, scale_row, own_row,
                inverse_column, limit, num_columns, num_tiles, rows_padded, columns_padded, HAS_MARGIN,
            )  # fmt: skip
            k += 1
            edge = tl.load(edges + k)


@triton.jit
def close(
    tile_max, tile_sum, own_largest, own_sum, weights, shift, total, factor,
    first_row, num_rows, chunk_rows, num_tiles, rows_padded,
    HAS_OWN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Per row and prefix: shift (the largest positive exponent), Σ e^(L − shift), the factor that turns e^(L − shift) into G.

    A program owns BLOCK_R rows at one prefix and goes through the tiles in order. Exponents are to the base 2.
    """
    k = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = rows < chunk_rows
    tiles = k * num_tiles * rows_padded + rows
    at = k * num_rows + first_row + rows
    own_exponent = tl.load(own_largest + at, valid, other=MASKED) if HAS_OWN else tl.full((BLOCK_R,), MASKED, tl.float32)
    largest = tl.maximum(own_exponent, 0.0)
    for tile in range(num_tiles):
        largest = tl.maximum(largest, tl.load(tile_max + tiles + tile * rows_padded))
    sums = tl.zeros((BLOCK_R,), tl.float32)
    if HAS_OWN:
        sums += tl.load(own_sum + at, valid, other=0.0) * tl.exp2(own_exponent - largest)
    for tile in range(num_tiles):
        exponent = tl.load(tile_max + tiles + tile * rows_padded)
        sums += tl.load(tile_sum + tiles + tile * rows_padded) * tl.exp2(exponent - largest)
    tl.store(shift + at, largest, valid)
    tl.store(total + at, sums, valid)
    tl.store(factor + k * rows_padded + rows, tl.where(valid, tl.load(weights + k) / (tl.exp2(-largest) + sums), 0.0))


@triton.jit
def weigh(
    weight, tile_max, factor, shift, own, pull_row, pull_column, row_part, column_part,
    first_row, num_rows, chunk_rows, num_columns, num_prefixes, num_tiles, rows_padded, columns_padded,
    BLOCK_M: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """E becomes W in place; per row and per column of the tile, Σ G s of every prefix.

    A program owns a tile at all prefixes and goes from the last to the first, W accumulating in fp32. Scores come back as the
    logarithm of E.
    """
    half, tile = tl.program_id(0), tl.program_id(1)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = half * HALF + tl.arange(0, HALF)
    valid, inside = rows < chunk_rows, columns < num_columns
    row = tl.where(valid, first_row + rows, 0)
    merged = tl.zeros((BLOCK_M, HALF), tl.float32)
    for i in range(num_prefixes):
        k = num_prefixes - 1 - i
        at = (k * num_tiles + half) * rows_padded + rows
        exponent = tl.load(tile_max + at)
        place = weight + (k * rows_padded + rows).to(tl.int64)[:, None] * columns_padded + columns[None, :]
        e = tl.load(place).to(tl.float32)
        base = k * num_rows + row
        gradient = e * (tl.load(factor + k * rows_padded + rows) * tl.exp2(exponent - tl.load(shift + base)))[:, None]
        score = tl.log2(tl.maximum(e, 1e-38)) + (exponent + tl.load(own + base))[:, None]
        product = tl.where(e > 0, gradient * score, 0.0)
        tl.store(row_part + at, tl.sum(product, 1))
        tl.store(column_part + (k * tl.num_programs(1) + tile) * columns_padded + columns, tl.sum(product, 0))
        pull = tl.load(pull_column + k * num_columns + columns, inside, other=0.0)
        merged += gradient * tl.load(pull_row + base)[:, None] * pull[None, :]
        tl.store(place, merged.to(weight.dtype.element_ty))


@triton.jit
def pull_rows(
    weight, column, query, passage, own_weight, share, gradient, tile_prefix,
    first_row, num_rows, chunk_rows, num_columns, offset, width, rows_padded, columns_padded,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dQ of a chunk of rows: W X, plus the own passage's pull, less the share of the normalisation.

    A program owns BLOCK_M rows by BLOCK_N coordinates of one block and accumulates over all columns in order, in fp32.
    """
    tiles_n = width // BLOCK_N
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    coordinates = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.load(tile_prefix + tile_n)
    steps = tl.arange(0, BLOCK_K)
    weight_tile = weight + (k * rows_padded + rows).to(tl.int64)[:, None] * columns_padded + steps[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, columns_padded, BLOCK_K):
        index = tl.minimum(start + steps, num_columns - 1).to(tl.int64)
        column_tile = tl.load(column + index[:, None] * width + coordinates[None, :])
        total = tl.dot(tl.load(weight_tile + start), column_tile, total, input_precision="ieee")
    valid = rows < chunk_rows
    row = (first_row + rows).to(tl.int64)
    mask = valid[:, None]
    own = tl.load(own_weight + k * num_rows + row, valid, other=0.0)
    passage_tile = tl.load(passage + (row + offset)[:, None] * width + coordinates[None, :], mask, other=0.0)
    total += own[:, None] * passage_tile.to(tl.float32)
    normal = tl.load(share + k * num_rows + row, valid, other=0.0)
    query_tile = tl.load(query + row[:, None] * width + coordinates[None, :], mask, other=0.0)
    total -= normal[:, None] * query_tile.to(tl.float32)
    tl.store(gradient + row[:, None] * width + coordinates[None, :], total.to(gradient.dtype.element_ty), mask)


@triton.jit
def pull_columns(
    weight, query, original_query, column, own_weight, share, gradient, running, tile_prefix,
    first_row, num_rows, chunk_rows, num_columns, offset, width, rows_padded, columns_padded,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dX: Wᵀ Q, added over the chunks in order; at the last one the own rows' pull and the share of the normalisation.

    A program owns BLOCK_M columns by BLOCK_N coordinates of one block and accumulates over the chunk's rows in order, in fp32.
    """
    tiles_n = width // BLOCK_N
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    coordinates = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < num_columns
    k = tl.load(tile_prefix + tile_n)
    steps = tl.arange(0, BLOCK_K)
    place = columns.to(tl.int64)[:, None] * width + coordinates[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rows_padded, BLOCK_K):
        weight_tile = weight + (k * rows_padded + start + steps).to(tl.int64)[:, None] * columns_padded + columns[None, :]
        index = (first_row + tl.minimum(start + steps, chunk_rows - 1)).to(tl.int64)
        query_tile = tl.load(query + index[:, None] * width + coordinates[None, :])
        total = tl.dot(tl.trans(tl.load(weight_tile)), query_tile, total, input_precision="ieee")
    if not FIRST:
        total += tl.load(running + place, inside[:, None], other=0.0)
    if LAST:
        row = columns - offset
        owned = (row >= 0) & (row < num_rows)
        own = tl.load(own_weight + k * num_rows + row, owned, other=0.0)
        index = tl.where(owned, row, 0).to(tl.int64)
        own_tile = tl.load(original_query + index[:, None] * width + coordinates[None, :])
        total += own[:, None] * own_tile.to(tl.float32)
        normal = tl.load(share + k * num_columns + columns, inside, other=0.0)
        total -= normal[:, None] * tl.load(column + place, inside[:, None], other=0.0).to(tl.float32)
        tl.store(gradient + place, total.to(gradient.dtype.element_ty), inside[:, None])
    else:
        tl.store(running + place, total, inside[:, None])
