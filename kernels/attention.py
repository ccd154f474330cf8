"""Attention over short sequences from packed qkv, and its backward into packed dqkv (formulas: ops/attention).

Scores are never written to memory, and there are no sums across programs, so results are bitwise reproducible. If the
keys fit in one block, a program holds whole rows of scores; otherwise it loops over blocks of keys with an online
softmax. In the forward, a program handles a block of rows of one head of one image.

In the backward, a program handles one head of one image: first dq, block by block, then dk and dv. It needs neither o
nor row sums of the forward.

    dq:      S = q k^T;  P;  dP = do v^T;  delta = rowsum(P dP);  dS = P (dP - delta);  dq = scale dS k
             also writes log2 of each row's sum of powers and delta for the second half: 8 bytes per row and head
    dk, dv:  S^T = k q^T;  P^T;  dP^T = v do^T;  dS^T = P^T (dP^T - delta);  dv = P^T do;  dk = scale dS^T q

Products: 7 if dq has whole rows, else 9 (dS needs delta first, so S and dP are computed twice); an implementation with
atomics has 5. The second half computes the transposed scores directly, because Triton before 3.7.1 silently
miscompiles the transpose of a product on sm_90.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnull.kernels.common import COMPILE, check_dtypes, generation_of, on_device_of
from fastnull.kernels.tiles import changed
from fastnull.ops.attention import WIDEST_HEAD
from fastnull.ops.common import empty

LOG2_E = tl.constexpr(1.4426950408889634)  # kernels can only read globals of this type


@dataclass(frozen=True)
class AttentionTile:
    """Block sizes of queries and keys, for heads up to `head` wide, up to `tokens` tokens, and GPU generations (see
    `generation`) from `since` on.

    If keys + tail cover all tokens, a program holds whole rows of scores in two tiles. Triton's tile sizes are powers
    of two, so 257 keys need 256 + 16, about half of the 512 of a single tile. The second half of the backward takes
    `block` keys and `queries` queries at a time.
    """

    head: int
    tokens: int
    queries: int
    keys: int
    warps: int
    stages: int = 2
    tail: int = 0
    block: int = 64
    since: int = 80


ANY = 1 << 30

# The first entry that fits is taken. Untuned on a GPU; chosen by compiling without spills under Triton 3.6 and 3.9
# (docs/kernels.md).
FORWARD = (
    AttentionTile(64, 64, 64, 64, 4),  # B/32: 50 tokens, one block
    AttentionTile(64, 80, 64, 64, 4, tail=16),  # 65 tokens
    AttentionTile(64, 256, 64, 256, 4, since=90),  # /16 at 224: 197 tokens; a warpgroup has 64 rows
    AttentionTile(64, 272, 64, 256, 4, tail=16, since=90),  # /14 at 224: 257 tokens
    AttentionTile(32, 256, 64, 64, 4),  # with heads of 32, even 32 whole rows spill on sm_80
    AttentionTile(64, 256, 32, 256, 4),  # 64 whole rows spill on sm_80
    AttentionTile(64, 272, 32, 256, 4, tail=16),
    AttentionTile(64, ANY, 128, 128, 8),  # 577 = 4.5 blocks: each key is read half as often as with 64 queries
    AttentionTile(128, ANY, 64, 64, 4, since=90),
    AttentionTile(128, ANY, 64, 32, 4),  # 64 x 64 spills on sm_80: under 3.6 with 4 warps, under 3.9 with 8
)
GRADIENT = (
    AttentionTile(64, 64, 64, 64, 4, stages=1, since=90),  # too few blocks to load ahead
    AttentionTile(64, 80, 64, 64, 4, stages=1, tail=16, since=90),
    AttentionTile(64, 64, 32, 64, 4),
    AttentionTile(64, 80, 32, 64, 4, stages=1, tail=16),
    AttentionTile(64, 256, 64, 256, 8, since=100),
    AttentionTile(64, 272, 64, 256, 8, tail=16, since=100),
    AttentionTile(64, ANY, 64, 64, 8, since=100),  # with 4 warps it spills under 3.9
    # On sm_90, 64 whole rows of S and dP spill, and 32 are too few for wgmma.
    AttentionTile(64, ANY, 64, 64, 4, since=90),
    AttentionTile(32, 272, 64, 64, 4),  # with heads of 32, whole rows and blocks of 128 keys spill on sm_80
    AttentionTile(64, 256, 32, 256, 8),
    AttentionTile(64, 272, 32, 256, 8, tail=16, block=32),  # blocks of 64 spill under 3.6
    AttentionTile(64, ANY, 64, 64, 4, block=32),  # likewise, and 64 x 128
    AttentionTile(128, ANY, 64, 64, 8),
)
# float32 products are exact ("ieee") and run on CUDA cores; with 4 warps the operands of 32 x 32 spill.
FLOAT32 = (AttentionTile(64, ANY, 32, 32, 8, block=32), AttentionTile(128, ANY, 16, 32, 4, block=16))
# Changes that `fastnull selftest --tiles` tries; a tile smaller than the row loops over the keys.
CANDIDATES = (
    {"queries": 64, "keys": 64, "warps": 4, "tail": 0},
    {"queries": 64, "keys": 64, "warps": 4, "stages": 3, "tail": 0},
    {"queries": 64, "keys": 128, "warps": 4, "tail": 0},
    {"queries": 64, "keys": 128, "warps": 8, "tail": 0},
    {"queries": 128, "keys": 64, "warps": 8, "tail": 0},
    {"queries": 128, "keys": 128, "warps": 8, "tail": 0},
    {"queries": 64, "keys": 128, "warps": 8, "tail": 128},
    {"queries": 64, "keys": 256, "warps": 4, "tail": 0},
    {"queries": 64, "keys": 256, "warps": 8, "tail": 0},
    {"queries": 64, "keys": 256, "warps": 8, "tail": 16},
    {"queries": 128, "keys": 256, "warps": 8, "tail": 0},
    {"queries": 32, "keys": 256, "warps": 8, "tail": 0},
)


@triton.jit
def _rows(base, row, N, stride, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [rows, WIDTH] of one head; 0 beyond N tokens and HEAD columns."""
    column = tl.arange(0, WIDTH)
    valid = (row < N)[:, None] & (column < HEAD)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + column[None, :], valid, 0.0)


@triton.jit
def _store_rows(base, row, values, N, stride, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    valid = (row < N)[:, None] & (column < HEAD)[None, :]
    tl.store(base + row.to(tl.int64)[:, None] * stride + column[None, :], values, valid)


@triton.jit
def _keys(source, start, N, stride, part, HEAD: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """k and v [COUNT, WIDTH] of one head, and which keys they are."""
    key = start + tl.arange(0, COUNT)
    k = _rows(source + part, key, N, stride, HEAD, WIDTH)
    v = _rows(source + 2 * part, key, N, stride, HEAD, WIDTH)
    return k, v, key


@triton.jit
def _scores(q, k, key, N, scale):
    """log2 of the unnormalised probabilities [queries, keys]; scale holds log2(e). Keys beyond N get none."""
    return tl.where((key < N)[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))


@triton.jit
def attention_kernel(
    qkv,  # [B, N, 3, H, d], dense in d
    o,  # [B, N, H, d], dense in d
    N,
    H,
    scale,  # times log2(e)
    qkv_b,
    qkv_n,
    qkv_part,
    qkv_h,
    o_b,
    o_n,
    o_h,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    blocks = tl.cdiv(N, QUERIES)
    image, head = (tl.program_id(0) // blocks // H).to(tl.int64), (tl.program_id(0) // blocks % H).to(tl.int64)
    query = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    source = qkv + image * qkv_b + head * qkv_h
    q = _rows(source, query, N, qkv_n, HEAD, WIDTH)
    if WHOLE:
        k, v, key = _keys(source, 0, N, qkv_n, qkv_part, HEAD, WIDTH, KEYS)
        s = _scores(q, k, key, N, scale)
        top = tl.max(s, 1)
        if TAIL:
            k_tail, v_tail, key_tail = _keys(source, KEYS, N, qkv_n, qkv_part, HEAD, WIDTH, TAIL)
            s_tail = _scores(q, k_tail, key_tail, N, scale)
            top = tl.maximum(top, tl.max(s_tail, 1))
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        sums = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        if TAIL:
            p_tail = tl.exp2(s_tail - top[:, None])
            total += tl.sum(p_tail, 1)
            sums = tl.dot(p_tail.to(v.dtype), v_tail, sums, input_precision="ieee")
    else:
        top = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        sums = tl.zeros([QUERIES, WIDTH], tl.float32)
        for start in range(0, N, KEYS):
            k, v, key = _keys(source, start, N, qkv_n, qkv_part, HEAD, WIDTH, KEYS)
            s = _scores(q, k, key, N, scale)
            new_top = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(s - new_top[:, None])
            total = total * shrink + tl.sum(p, 1)
            sums = tl.dot(p.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
            top = new_top
    _store_rows(o + image * o_b + head * o_h, query, sums / total[:, None], N, o_n, HEAD, WIDTH)


@triton.jit
def _query_gradient(
    source,  # q of one head; k and v follow at distances of `part`
    grad_o,  # of the same head
    target,  # dq of the same head; dk and dv follow
    logs,  # [N] float32, written: log2 of the row's sum of powers
    deltas,  # [N] float32, written: rowsum(P dP)
    start,
    N,
    scale,
    qkv_n,
    part,
    grad_n,
    target_n,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dq of the block of queries at `start`, and the two values of each row that `_key_gradient` needs."""
    query = start + tl.arange(0, QUERIES)
    scale_log2 = scale * LOG2_E
    q = _rows(source, query, N, qkv_n, HEAD, WIDTH)
    do = _rows(grad_o, query, N, grad_n, HEAD, WIDTH)
    if WHOLE:
        k, v, key = _keys(source, 0, N, qkv_n, part, HEAD, WIDTH, KEYS)
        s = _scores(q, k, key, N, scale_log2)
        top = tl.max(s, 1)
        if TAIL:
            k_tail, v_tail, key_tail = _keys(source, KEYS, N, qkv_n, part, HEAD, WIDTH, TAIL)
            s_tail = _scores(q, k_tail, key_tail, N, scale_log2)
            top = tl.maximum(top, tl.max(s_tail, 1))
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        delta = tl.sum(p * dp, 1)
        if TAIL:
            p_tail = tl.exp2(s_tail - top[:, None])
            total += tl.sum(p_tail, 1)
            dp_tail = tl.dot(do, tl.trans(v_tail), input_precision="ieee")
            delta += tl.sum(p_tail * dp_tail, 1)
        delta = delta / total
        dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, input_precision="ieee")
        if TAIL:
            ds_tail = p_tail * (dp_tail - delta[:, None])
            dq = tl.dot(ds_tail.to(k.dtype), k_tail, dq, input_precision="ieee")
        dq = dq / total[:, None]  # of the probabilities: p is not divided by their sum before
        log = top + tl.log2(total)
    else:
        top = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        delta = tl.zeros([QUERIES], tl.float32)
        for first in range(0, N, KEYS):
            k, v, key = _keys(source, first, N, qkv_n, part, HEAD, WIDTH, KEYS)
            s = _scores(q, k, key, N, scale_log2)
            new_top = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(s - new_top[:, None])
            total = total * shrink + tl.sum(p, 1)
            delta = delta * shrink + tl.sum(p * tl.dot(do, tl.trans(v), input_precision="ieee"), 1)
            top = new_top
        delta = delta / total
        log = top + tl.log2(total)
        dq = tl.zeros([QUERIES, WIDTH], tl.float32)
        for first in range(0, N, KEYS):
            k, v, key = _keys(source, first, N, qkv_n, part, HEAD, WIDTH, KEYS)
            p = tl.exp2(_scores(q, k, key, N, scale_log2) - log[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store_rows(target, query, dq * scale, N, target_n, HEAD, WIDTH)
    tl.store(logs + query, log, query < N)
    tl.store(deltas + query, delta, query < N)


@triton.jit
def _key_gradient(
    source,
    grad_o,
    target,
    logs,
    deltas,
    start,
    N,
    scale,
    qkv_n,
    part,
    grad_n,
    target_n,
    target_part,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dk and dv of the block of keys at `start`, from the logs and deltas of all rows."""
    scale_log2 = scale * LOG2_E
    k, v, key = _keys(source, start, N, qkv_n, part, HEAD, WIDTH, KEYS)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    for first in range(0, N, QUERIES):
        query = first + tl.arange(0, QUERIES)
        q = _rows(source, query, N, qkv_n, HEAD, WIDTH)
        do = _rows(grad_o, query, N, grad_n, HEAD, WIDTH)
        # Infinity makes the probabilities of queries beyond N zero. Rows of keys beyond N are not stored.
        log = tl.load(logs + query, query < N, float("inf"))
        delta = tl.load(deltas + query, query < N, 0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - log[None, :])  # [keys, queries]
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    _store_rows(target + target_part, key, dk * scale, N, target_n, HEAD, WIDTH)
    _store_rows(target + 2 * target_part, key, dv, N, target_n, HEAD, WIDTH)


@triton.jit
def attention_dqkv_kernel(
    qkv,  # [B, N, 3, H, d], dense in d
    grad_o,  # [B, N, H, d], dense in d
    dqkv,  # [B, N, 3, H, d], dense in d
    logs,  # [B, H, N] float32
    deltas,  # [B, H, N] float32
    N,
    H,
    scale,
    qkv_b,
    qkv_n,
    qkv_part,
    qkv_h,
    grad_b,
    grad_n,
    grad_h,
    dqkv_b,
    dqkv_n,
    dqkv_part,
    dqkv_h,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    source = qkv + image * qkv_b + head * qkv_h
    grad_o += image * grad_b + head * grad_h
    target = dqkv + image * dqkv_b + head * dqkv_h
    logs += (image * H + head) * N
    deltas += (image * H + head) * N
    # The loops inside are pipelined, not these. Addresses moved out of these would spill.
    for start in tl.range(0, N, QUERIES, num_stages=1, disable_licm=True):
        _query_gradient(
            source, grad_o, target, logs, deltas, start, N, scale, qkv_n, qkv_part, grad_n, dqkv_n,
            HEAD, WIDTH, QUERIES, KEYS, TAIL, WHOLE,
        )  # fmt: skip
    tl.debug_barrier()  # the logs and deltas that other threads of the program wrote are read below
    for start in tl.range(0, N, BLOCK, num_stages=1, disable_licm=True):
        _key_gradient(
            source, grad_o, target, logs, deltas, start, N, scale, qkv_n, qkv_part, grad_n, dqkv_n, dqkv_part,
            HEAD, WIDTH, QUERIES, BLOCK,
        )  # fmt: skip


def _check(qkv: Tensor) -> None:
    if qkv.shape[-1] > WIDEST_HEAD:
        raise ValueError(f"heads must be at most {WIDEST_HEAD} wide for the Triton kernels; got {qkv.shape[-1]}")


def _tile(entries: tuple[AttentionTile, ...], qkv: Tensor) -> AttentionTile:
    entries = FLOAT32 if qkv.dtype == torch.float32 else entries
    N, d, generation = qkv.shape[1], qkv.shape[4], generation_of(qkv)
    return changed(next(t for t in entries if d <= t.head and t.tokens >= N and t.since <= generation))


def _row(tile: AttentionTile, N: int) -> dict[str, int | bool]:
    """Whether a program holds whole rows of scores, and the size of the second tile for it."""
    return {"WHOLE": tile.keys + tile.tail >= N, "TAIL": tile.tail}


def _constants(tile: AttentionTile, head: int) -> dict[str, int]:
    width = max(triton.next_power_of_2(head), 16)
    sizes = {"HEAD": head, "WIDTH": width, "QUERIES": tile.queries, "KEYS": tile.keys}
    return {**sizes, "num_warps": tile.warps, "num_stages": tile.stages}


def attention_out(qkv: Tensor, scale: float, o: Tensor) -> None:
    """Launcher of `torch.ops.fastnull.attention_out`: qkv [B, N, 3, H, d], o [B, N, H, d], dense in d."""
    check_dtypes(qkv=qkv, o=o)
    _check(qkv)
    if not qkv.numel():
        return
    B, N, _, H, d = qkv.shape
    tile = _tile(FORWARD, qkv)
    with on_device_of(qkv):
        attention_kernel[(triton.cdiv(N, tile.queries) * B * H,)](
            qkv, o, N, H, scale * LOG2_E.value, *qkv.stride()[:4], *o.stride()[:3],
            **_row(tile, N), **_constants(tile, d), **COMPILE,
        )  # fmt: skip


def attention_dqkv_out(qkv: Tensor, grad_o: Tensor, scale: float, dqkv: Tensor) -> None:
    """Launcher of `torch.ops.fastnull.attention_dqkv_out`: dqkv as qkv, grad_o [B, N, H, d], all dense in d."""
    check_dtypes(qkv=qkv, grad_o=grad_o, dqkv=dqkv)
    _check(qkv)
    if not qkv.numel():
        return
    B, N, _, H, d = qkv.shape
    logs, deltas = (empty((B, H, N), dtype=torch.float32, device=qkv.device) for _ in range(2))
    tile = _tile(GRADIENT, qkv)
    with on_device_of(qkv):
        attention_dqkv_kernel[(B * H,)](
            qkv, grad_o, dqkv, logs, deltas, N, H, scale,
            *qkv.stride()[:4], *grad_o.stride()[:3], *dqkv.stride()[:4],
            **_row(tile, N), **_constants(tile, d), BLOCK=tile.block, **COMPILE,
        )  # fmt: skip
