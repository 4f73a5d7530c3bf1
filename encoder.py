"""The ear: log-mel features and a conformer encoder, one frame of 40 ms out for every four of 10 ms in.

The encoder follows the conformer (Gulati et al., 2005.08100): half-step feed-forward, self-attention with
relative positions (Dai et al., 1901.02860), convolution module, half-step feed-forward, LayerNorm. What leaves it
is a learned softmax-weighted sum of its layers' outputs, as in the speech LM of 2509.01939. It is trained once, with
CTC (Graves et al., 2006), and is frozen from then on: `python sft.py --stage encoder`.

Every utterance gives the same frames alone and in any batch. Two rules see to that: whatever mixes time (the
convolutions, attention, the feature statistics) sees zeros or nothing beyond an utterance's end, and the
normalisations are over one frame's channels (LayerNorm, never BatchNorm).

Letters: B utterances, N samples at 16 kHz, T frames (10 ms before the subsampling, 40 ms after), M mel bins,
D channels, H heads, U units of a transcript.
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

SAMPLE_RATE = 16000
WINDOW, HOP, N_FFT = 400, 160, 512  # samples: 25 ms, 10 ms, and the next power of two


@dataclass(frozen=True)
class EncoderConfig:
    """The conformer's shape; the defaults are the tiny one of the embedded corpus (the paper's has 2B parameters)."""
    units: tuple = ()    # what CTC spells, phones or characters; unit i is number i + 1, number 0 is the blank
    n_mels: int = 80
    channels: int = 16   # of the two subsampling convolutions
    d: int = 128
    n_layers: int = 4
    n_heads: int = 4
    ffn: int = 384
    kernel: int = 15     # frames of 40 ms that the convolution module sees: 0.6 s
    dropout: float = 0.0


# ---------------------------------------------------------------------------------------------- features
@lru_cache
def mel_filters(n_mels):
    """Triangles spaced evenly in mel (2595 log10(1 + f/700)), 0 to 8000 Hz: (M, N_FFT // 2 + 1)."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    hz = 700 * (10 ** (torch.linspace(0, top, n_mels + 2) / 2595) - 1)         # (M + 2,)
    f = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)                     # (N_FFT // 2 + 1,)
    up = (f - hz[:-2, None]) / (hz[1:-1] - hz[:-2])[:, None]
    down = (hz[2:, None] - f) / (hz[2:] - hz[1:-1])[:, None]
    return torch.minimum(up, down).clamp(min=0)


def length_mask(lengths, T):
    """(B, T) bool, true on the first lengths[b] of T. Masks come from lengths, never from values."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def n_frames(n_samples):
    """Frames of 10 ms in n samples: only whole windows count, so no frame reaches into the padding."""
    return (n_samples.clamp(min=WINDOW) - WINDOW) // HOP + 1


def log_mel(audio, lengths, n_mels=80):
    """Log-mel spectrogram, normalised per utterance and bin over its own frames.

    audio (B, N) float in [-1, 1] at 16 kHz, zero beyond lengths (B,) in samples -> (B, T, M), (B,) in frames of 10 ms.
    """
    audio = F.pad(audio, (0, max(0, WINDOW - audio.shape[1])))
    window = torch.hann_window(WINDOW, device=audio.device)
    filters, mels = mel_filters(n_mels).to(audio.device).T, []
    for rows in audio.split(4):  # a few at a time stay in the cache: half as long as all at once
        frames = rows.unfold(1, WINDOW, HOP) * window                          # (4, T, WINDOW)
        spectrum = torch.fft.rfft(frames, N_FFT)                               # (4, T, N_FFT // 2 + 1), complex
        power = spectrum.real.square() + spectrum.imag.square()  # abs() would take roots first: three times as long
        mels.append((power @ filters).clamp(min=1e-8).log())                   # (4, T, M)
    mel = torch.cat(mels)                                                      # (B, T, M)
    T = n_frames(lengths)
    mask = length_mask(T, mel.shape[1])[..., None]                             # (B, T, 1)
    mean = (mel * mask).sum(1, keepdim=True) / T[:, None, None]
    var = ((mel - mean).square() * mask).sum(1, keepdim=True) / T[:, None, None]
    return (mel - mean) / (var + 1e-4).sqrt() * mask, T


def spec_augment(mel, lengths, n_freq=2, freq=12, n_time=2, time=0.06):
    """SpecAugment (Park et al., 1904.08779) without warping: bands of up to `freq` bins and spans of up to `time` of the
    utterance become 0, which is the mean. mel (B, T, M) -> the same shape; draws from torch's global generator."""
    B, T, M = mel.shape
    keep = torch.ones(B, T, M, dtype=torch.bool, device=mel.device)
    t, m = torch.arange(T, device=mel.device), torch.arange(M, device=mel.device)
    for _ in range(n_freq):
        width = torch.rand(B, 1, device=mel.device) * freq
        start = torch.rand(B, 1, device=mel.device) * (M - width)
        keep &= ~((m >= start) & (m < start + width))[:, None, :]
    for _ in range(n_time):
        width = torch.rand(B, 1, device=mel.device) * lengths[:, None] * time
        start = torch.rand(B, 1, device=mel.device) * (lengths[:, None] - width)
        keep &= ~((t >= start) & (t < start + width))[:, :, None]
    return mel * keep


# ---------------------------------------------------------------------------------------------- blocks
class Subsampling(nn.Module):
    """Two convolutions of stride 2 in time and frequency: frames of 10 ms become frames of 40 ms."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(1, c.channels, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(c.channels, c.channels, 3, stride=2, padding=1)
        self.out = nn.Linear(c.channels * subsampled(subsampled(c.n_mels)), c.d)

    def forward(self, x, lengths):
        x = x[:, None]                                                         # (B, 1, T, M)
        for conv in (self.conv1, self.conv2):
            x = x * length_mask(lengths, x.shape[2])[:, None, :, None]  # a bias has refilled the pads: empty them
            x = F.relu(conv(x))                                                # (B, C, T / 2, M / 2)
            lengths = subsampled(lengths)
        return self.out(x.transpose(1, 2).flatten(2)), lengths                 # (B, T / 4, D)


def subsampled(n):
    """The length that one convolution of kernel 3, stride 2 and padding 1 leaves of n."""
    return (n - 1) // 2 + 1


def feed_forward(c):
    """LayerNorm, Linear, SiLU, Linear: (B, T, D) -> (B, T, D)."""
    return nn.Sequential(nn.LayerNorm(c.d), nn.Linear(c.d, c.ffn), nn.SiLU(), nn.Dropout(c.dropout),
                         nn.Linear(c.ffn, c.d), nn.Dropout(c.dropout))


class RelativeAttention(nn.Module):
    """Self-attention whose score is (q + u) k_j + (q + v) r_{i-j}: content, and how far apart i and j are."""

    def __init__(self, c):
        super().__init__()
        self.n_heads = c.n_heads
        self.norm = nn.LayerNorm(c.d)
        self.qkv, self.rel, self.out = nn.Linear(c.d, 3 * c.d), nn.Linear(c.d, c.d, bias=False), nn.Linear(c.d, c.d)
        self.u, self.v = (nn.Parameter(torch.zeros(c.n_heads, 1, c.d // c.n_heads)) for _ in range(2))

    def forward(self, x, mask):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, hd)
        r = self.rel(distances(T, D).to(x)).view(2 * T - 1, self.n_heads, -1).transpose(0, 1)    # (H, 2T - 1, hd)
        by_distance = (q + self.v) @ r.transpose(1, 2)                         # (B, H, T, 2T - 1): from T - 1 to 1 - T
        # Row i wants distances i, i - 1, ..: it begins at column T - 1 - i. Reading the same memory with rows one
        # shorter does that without an index and without a copy.
        by_distance = by_distance.as_strided((B, self.n_heads, T, T), (*by_distance.stride()[:2], 2 * T - 2, 1), T - 1)
        score = ((q + self.u) @ k.transpose(2, 3) + by_distance) / math.sqrt(D // self.n_heads)
        weight = score.masked_fill(~mask[:, None, None], -1e4).softmax(-1)     # (B, H, T, T)
        return self.out((weight @ v).transpose(1, 2).reshape(B, T, D))


@lru_cache(maxsize=512)
def distances(T, D):
    """Sinusoids of the distances T - 1 .. 1 - T: (2T - 1, D)."""
    angle = torch.arange(T - 1, -T, -1)[:, None] * torch.exp(torch.arange(0, D, 2) * (-math.log(10000.0) / D))
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Convolution(nn.Module):
    """Pointwise + GLU, depthwise over time, LayerNorm, SiLU, pointwise."""

    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.d), nn.LayerNorm(c.d)
        self.expand, self.project = nn.Linear(c.d, 2 * c.d), nn.Linear(c.d, c.d)
        self.depthwise = nn.Conv1d(c.d, c.d, c.kernel, padding=c.kernel // 2, groups=c.d)

    def forward(self, x, mask):
        x = F.glu(self.expand(self.norm1(x)), dim=-1) * mask[..., None]  # right before time is mixed, not earlier
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)                  # (B, T, D)
        return self.project(F.silu(self.norm2(x)))


class Block(nn.Module):
    """One conformer layer: (B, T, D) -> (B, T, D)."""

    def __init__(self, c):
        super().__init__()
        self.ffn1, self.attn, self.conv, self.ffn2 = feed_forward(c), RelativeAttention(c), Convolution(c), feed_forward(c)
        self.norm, self.drop = nn.LayerNorm(c.d), nn.Dropout(c.dropout)

    def forward(self, x, mask):
        x = x + 0.5 * self.ffn1(x)
        x = x + self.drop(self.attn(x, mask))
        x = x + self.drop(self.conv(x, mask))
        x = x + 0.5 * self.ffn2(x)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------- model
class Encoder(nn.Module):
    """Log-mel (B, T, M) with lengths (B,) in frames of 10 ms -> (B, T / 4, D) and lengths in frames of 40 ms."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.subsampling = Subsampling(c)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.layer_weights = nn.Parameter(torch.zeros(c.n_layers))  # equal at first
        self.number = {unit: i + 1 for i, unit in enumerate(c.units)}  # what CTC calls each unit; 0 is the blank
        self.ctc_head = nn.Linear(c.d, len(c.units) + 1)
        self.register_buffer("unit_frames", torch.zeros(len(c.units) + 1, c.d))  # mean frame of the blank and of each unit, once trained

    def forward(self, mel, lengths):
        x, lengths = self.subsampling(mel, lengths)
        mask = length_mask(lengths, x.shape[1])                                # (B, T)
        outputs = []
        for block in self.blocks:
            x = block(x, mask)
            outputs.append(x)
        weights = self.layer_weights.softmax(0)
        x = sum(w * o for w, o in zip(weights, outputs))
        return x * mask[..., None], lengths                                    # (B, T, D), (B,)

    def ctc_loss(self, mel, lengths, targets, target_lengths):
        """CTC against unit numbers targets (B, U), padded beyond target_lengths (B,): summed over the batch, in nats.

        An utterance too short for its transcript (U units and their repeats need as many frames) counts as 0.
        """
        x, lengths = self(mel, lengths)
        logp = self.ctc_head(x).float().log_softmax(-1).transpose(0, 1)        # (T, B, units + 1)
        return F.ctc_loss(logp, targets, lengths, target_lengths, blank=0, reduction="sum", zero_infinity=True)

    @torch.no_grad()
    def ctc_greedy(self, mel, lengths):
        """Best path: the likeliest unit of each frame, repeats merged, blanks dropped. B strings, units parted by spaces."""
        x, lengths = self(mel, lengths)
        best = self.ctc_head(x).argmax(-1).cpu()                               # (B, T)
        rows = [torch.unique_consecutive(row[:n]).tolist() for row, n in zip(best, lengths.tolist())]
        return [" ".join(self.config.units[i - 1] for i in row if i != 0) for row in rows]
