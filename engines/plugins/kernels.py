"""Triton kernels of the custom operators: one launch each, sums and softmax in float32, results in the tensors' type.

Letters: B batch, S length, H hidden size, k ratio, m = ceil(S / k) groups, r width of the adapter. A program handles
ROWS of the B * m groups, whose k tokens lie side by side in memory. Sizes of tiles are powers of two, at least 16, as
the matrix units want; what lies outside is masked. The order of arguments is TensorRT's: inputs, sizes, output.
"""

import triton
import triton.language as tl

# Logit of a padded position, as in the eager operator: its softmax weight is exactly 0.
MASKED_LOGIT = tl.constexpr(-1e4)


@triton.jit
def token_merge(
    x,
    weight,
    bias,
    length,
    groups,
    total,
    y,
    RATIO: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x [B,S,H], weight [k,k*H], bias [k] -> y [B,m,H]. ``total`` is B * m, SLOTS a power of two, at least k."""
    _merge(x, x, weight, bias, length, groups, total, y, RATIO, HIDDEN, ROWS, SLOTS, COLUMNS, False)


@triton.jit
def masked_token_merge(
    x,
    mask,
    weight,
    bias,
    length,
    groups,
    total,
    y,
    RATIO: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same with mask [B,S] of 0 and 1 in x's type."""
    _merge(x, mask, weight, bias, length, groups, total, y, RATIO, HIDDEN, ROWS, SLOTS, COLUMNS, True)


@triton.jit
def _merge(
    x,
    mask,
    weight,
    bias,
    length,
    groups,
    total,
    y,
    RATIO: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slots = tl.arange(0, SLOTS)
    # 64 bits: B * S * H may pass 2^31.
    first = (row // groups).to(tl.int64) * length + (row % groups) * RATIO
    left = tl.where(row < total, length - (row % groups) * RATIO, 0)

    logits = tl.zeros((ROWS, SLOTS), dtype=tl.float32)
    for slot in range(RATIO):
        inside = slot < left
        for start in range(0, HIDDEN, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            tokens = _tokens(x, mask, first + slot, inside, columns, HIDDEN, MASKED)
            part = tl.load(
                weight + slots[None, :] * (RATIO * HIDDEN) + slot * HIDDEN + columns[:, None],
                mask=(slots < RATIO)[None, :] & (columns < HIDDEN)[:, None],
                other=0.0,
            )
            logits = tl.dot(tokens, part, logits, input_precision="ieee")
    logits += tl.load(bias + slots, mask=slots < RATIO, other=0.0).to(tl.float32)[None, :]

    if MASKED:
        keep = tl.load(mask + first[:, None] + slots[None, :], mask=slots[None, :] < left[:, None], other=0.0)
        keep = tl.where(slots[None, :] < RATIO, keep, 0.0).to(tl.float32)
        logits = tl.where(keep > 0.5, logits, MASKED_LOGIT)
    logits = tl.where((slots < RATIO)[None, :], logits, float("-inf"))
    shares = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    shares /= tl.sum(shares, axis=1)[:, None]
    if MASKED:
        shares *= keep

    for start in range(0, HIDDEN, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        merged = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for slot in range(RATIO):
            share = tl.sum(tl.where((slots == slot)[None, :], shares, 0.0), axis=1)
            tokens = _tokens(x, mask, first + slot, slot < left, columns, HIDDEN, MASKED)
            merged += share[:, None] * tokens.to(tl.float32)
        tl.store(
            y + row.to(tl.int64)[:, None] * HIDDEN + columns[None, :],
            merged.to(y.dtype.element_ty),
            mask=(row < total)[:, None] & (columns < HIDDEN)[None, :],
        )


@triton.jit
def _tokens(x, mask, token, inside, columns, HIDDEN: tl.constexpr, MASKED: tl.constexpr):
    """Some columns of one token of each row; zeros where there is none, or the mask hides it."""
    found = tl.load(
        x + token[:, None] * HIDDEN + columns[None, :],
        mask=inside[:, None] & (columns < HIDDEN)[None, :],
        other=0.0,
    )
    if MASKED:
        keep = tl.load(mask + token, mask=inside, other=0.0).to(tl.float32)
        found = tl.where((keep > 0.5)[:, None], found, 0.0)
    return found


@triton.jit
def token_split(
    y,
    x,
    down_w,
    down_b,
    up_w,
    up_b,
    length,
    groups,
    total,
    out,
    RATIO: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y [B,m,H], x [B,S,H], down_w [r,2H], down_b [r], up_w [H,r], up_b [H] -> out [B,S,H].

    WIDTH is r, CODES a power of two, at least r. The half of ``down`` that acts on y is computed once per group.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    codes = tl.arange(0, CODES)
    first = (row // groups).to(tl.int64) * length + (row % groups) * RATIO
    left = tl.where(row < total, length - (row % groups) * RATIO, 0)
    group = row.to(tl.int64)

    from_group = _product(y, group, row < total, down_w, codes, HIDDEN, WIDTH, ROWS, CODES, COLUMNS)
    from_group += tl.load(down_b + codes, mask=codes < WIDTH, other=0.0).to(tl.float32)[None, :]

    for slot in range(RATIO):
        inside = slot < left
        code = from_group + _product(
            x, first + slot, inside, down_w + HIDDEN, codes, HIDDEN, WIDTH, ROWS, CODES, COLUMNS
        )
        code = 2 * tl.sigmoid(2 * code) - 1  # tanh, which Triton leaves to a library of each maker's
        code = code.to(x.dtype.element_ty)
        for start in range(0, HIDDEN, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            cell = (columns < HIDDEN)[None, :]
            up = tl.load(
                up_w + columns[None, :] * WIDTH + codes[:, None], mask=(codes < WIDTH)[:, None] & cell, other=0.0
            )
            token = tl.dot(code, up, input_precision="ieee")
            token += tl.load(up_b + columns, mask=columns < HIDDEN, other=0.0).to(tl.float32)[None, :]
            merged = tl.load(
                y + group[:, None] * HIDDEN + columns[None, :], mask=(row < total)[:, None] & cell, other=0.0
            )
            tl.store(
                out + (first + slot)[:, None] * HIDDEN + columns[None, :],
                (token + merged.to(tl.float32)).to(out.dtype.element_ty),
                mask=inside[:, None] & cell,
            )


@triton.jit
def _product(
    x,
    token,
    inside,
    down,
    codes,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows of x times one half of ``down_w`` [r,2H], to which ``down`` points."""
    product = tl.zeros((ROWS, CODES), dtype=tl.float32)
    for start in range(0, HIDDEN, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        tokens = tl.load(
            x + token[:, None] * HIDDEN + columns[None, :],
            mask=inside[:, None] & (columns < HIDDEN)[None, :],
            other=0.0,
        )
        part = tl.load(
            down + codes[None, :] * (2 * HIDDEN) + columns[:, None],
            mask=(codes < WIDTH)[None, :] & (columns < HIDDEN)[:, None],
            other=0.0,
        )
        product = tl.dot(tokens, part, product, input_precision="ieee")
    return product
