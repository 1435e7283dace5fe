"""The definitions once more, in NumPy and plain Python, sharing no code with dsv4x: what the tests trust."""

import math

import numpy as np
import torch


def e4m3fn(code):
    """OCP FP8 e4m3 from its definition: 1 sign, 4 exponent bits (bias 7), 3 fraction bits, no infinity."""
    sign, exponent, fraction = -1.0 if code & 0x80 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10))


def ue8m0(code):
    """OCP MX scale: 2**(code - 127), 255 is NaN."""
    return math.nan if code == 255 else math.ldexp(1.0, code - 127)


E4M3FN = np.array([e4m3fn(code) for code in range(256)])
UE8M0 = np.array([ue8m0(code) for code in range(256)])


def raw_bytes(data):
    """All bytes of the allocation a tensor is a view of, as a flat NumPy copy."""
    return data.detach().new_empty(0).set_(data.untyped_storage()).cpu().numpy().copy()


class Entries:
    """Entries of a DSv4 cache by slot, addressed as the format's description says."""

    def __init__(self, cache):
        self.raw, self.page_size, self.pages = raw_bytes(cache.data), cache.page_size, cache.data.shape[0]
        self.base, self.stride = cache.data.storage_offset(), cache.data.stride(0)

    def __getitem__(self, slot):
        page, i = divmod(int(slot), self.page_size)
        start = self.base + page * self.stride
        data = self.raw[start + i * 576 :][:576]
        scales = self.raw[start + self.page_size * 576 + i * 8 :][:7]
        nope = E4M3FN[data[:448]] * np.repeat(UE8M0[scales], 64)
        rope = (data[448:].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return np.concatenate([nope, rope.astype(np.float64)])

    def row(self, indices, span):
        """The valid entries of one index row, ``[n, 512]``."""
        valid = [s for s in indices[: max(0, span)] if 0 <= s < self.pages * self.page_size]
        return np.array([self[s] for s in valid]).reshape(-1, 512)


def attend_token(q, entries, sink, scale):
    """One token: float64 ``q [H, D]``, ``entries [n, D]`` -> ``out [H, min(D, 512)]``, ``lse [H]``."""
    out, lse = np.zeros((len(q), min(q.shape[1], 512))), np.full(q.shape[0], np.inf)
    for h in range(q.shape[0] if len(entries) else 0):
        logits = entries @ q[h] * scale
        weights = np.exp(logits - logits.max())
        lse[h] = math.log(weights.sum()) + logits.max()
        with np.errstate(over="ignore"):
            share = 1.0 if sink is None else 1.0 / (1.0 + np.exp(float(sink[h]) - lse[h]))
        out[h] = weights @ entries[:, :512] / weights.sum() * share
    return out, lse


def attend(q, rows, sink=None, scale=512**-0.5):
    """``rows``: each token's entries ``[n, 512]``. Returns float64 tensors ``out [T, H, 512]`` and ``lse [T, H]``."""
    q = q.detach().cpu().double().numpy()
    sink = None if sink is None else sink.cpu().double().numpy()
    results = [attend_token(q[t], rows[t], sink, scale) for t in range(len(q))]
    out = np.array([r[0] for r in results]).reshape(*q.shape[:2], -1)
    return torch.from_numpy(out), torch.from_numpy(np.array([r[1] for r in results]).reshape(q.shape[:2]))


def decode(q, scopes, sink=None, scale=512**-0.5):
    """``scopes``: (cache, indices, lens or None) of the window and of the extra cache."""
    readers = [(Entries(cache), indices.tolist(), lens) for cache, indices, lens in scopes]
    rows = []
    for t in range(q.shape[0]):
        parts = [
            reader.row(indices[t], len(indices[t]) if lens is None else int(lens[t]))
            for reader, indices, lens in readers
        ]
        rows.append(np.concatenate(parts))
    return attend(q, rows, sink, scale)
