"""The mouth: a Llama 3 decoder, and the speech language model that puts an encoder's frames into its prompt.

    <User> <BOS> Convert speech to text <S-BOS> s_1 .. s_N <System>  |  <BOS> x_1 .. x_T <EOS>
    ----------------------- prompt, run once per utterance ---------    --- response, G per utterance ---

(2509.01939, section II.) s_n are the frozen encoder's frames after one linear projection. The vertical bar is the one
idea of this file: everything to its left is the same for the G samples of a group, so `SpeechLM.prefill` runs it once
and returns its keys and values, and the responses' attention reads those where they are. Sampling, beam search, SFT
and the policy loss (with gradient) all go through the same two functions, `prefill` and `extend`; therefore the
log-probabilities of a rollout are those of training, to rounding.

The decoder is Llama 3's (2407.21783): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Letters: B utterances, G responses for each, N = B * G responses, P prompt positions, T new positions (in `hear` and `embed_prompt`
frames), S response positions that are read, D model width (of frames the encoder's), M mel bins, H query heads, K key-value heads,
R = H / K, hd width of a head, V tokens.
"""
import contextlib
import io
import math
from dataclasses import dataclass
from typing import NamedTuple

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from encoder import Encoder, length_mask


@dataclass(frozen=True)
class LlamaConfig:
    """The decoder's shape; the defaults are the tiny one of the embedded corpus."""
    vocab: int = 300
    d: int = 64
    n_layers: int = 2
    n_heads: int = 2
    n_kv_heads: int = 1
    ffn: int = 192
    tie: bool = True            # the output head is the embedding
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5


# 2b and 8b: the shapes of 2509.01939, section III; "8 KV groups" for both; the text says that the 8B ties its embeddings.
LLAMAS = {
    "tiny": LlamaConfig(),
    "29m": LlamaConfig(vocab=4096, d=512, n_layers=8, n_heads=8, n_kv_heads=4, ffn=1536, tie=False),  # a laptop's, for eval.py --bench
    "2b": LlamaConfig(vocab=187178, d=2048, n_layers=24, n_heads=16, n_kv_heads=8, ffn=8192, tie=False),
    "8b": LlamaConfig(vocab=187178, d=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn=16384, tie=True),
}

# ---------------------------------------------------------------------------------------------- tokens
PAD, BOS, EOS, USER, SYSTEM, S_BOS = range(6)  # PAD is no other token's id: it fills rows, no more
INSTRUCTION = "Convert speech to text"


def train_tokenizer(texts, vocab):
    """A sentencepiece BPE model of at most `vocab` tokens from a list of strings, as bytes (they go into the checkpoint)."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([INSTRUCTION] * max(1, len(texts) // 100) + list(texts)), model_writer=out,
        vocab_size=vocab, model_type="bpe", hard_vocab_limit=False, byte_fallback=False, character_coverage=1.0,
        pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=6, control_symbols=["<User>", "<System>", "<S-BOS>"],
        normalization_rule_name="identity", minloglevel=2)
    return out.getvalue()


def load_tokenizer(data):
    """Bytes of `train_tokenizer` -> sentencepiece processor with encode(text) and decode(ids)."""
    return sentencepiece.SentencePieceProcessor(model_proto=data)


# ---------------------------------------------------------------------------------------------- decoder
class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension, in fp32."""

    def __init__(self, d, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(d))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)  # FSDP's weights are bf16


LARGE = 2**17  # a matrix of fewer weights always goes through F.linear


def linear(x, layer):
    """x (.., D) @ layer.weight.T -> (.., O) for a layer without a bias, by the route that was the quickest on the CPU we measured.

    F.linear multiplies with MKL, which is slow on AMD's processors. Times beside its own, of LARGE matrices on an EPYC: `packed` weights
    by oneDNN's operator 2/3, under 16 rows 1/2; the transposed product, under 128 rows, 3/4; from 128 rows on a convolution of kernel 1
    over the rows, which is oneDNN's, 1/2.
    """
    rows, weight = x.numel() // x.shape[-1], layer.weight
    if not x.is_cpu or weight.numel() < LARGE or torch.is_autocast_enabled("cpu"):  # autocast knows F.linear alone
        return F.linear(x, weight)
    if hasattr(layer, "packed") and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, layer.packed, None, "none", [], "")  # no bias, nothing done to the product
    if rows < 128:
        return (weight @ x.reshape(rows, -1).T).T.reshape(*x.shape[:-1], -1)
    y = F.conv2d(x.reshape(1, rows, 1, -1).permute(0, 3, 1, 2), weight[:, :, None, None])  # (1, O, rows, 1), in memory (rows, O)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


@contextlib.contextmanager
def packed(llm):
    """While this lasts `linear` has a second copy of a CPU's large matrices, in the order in which oneDNN reads them: a product of the
    few rows of one decoding step mostly waits for its weights. It costs the time of one such step, so it is for loops of them; without
    gradient, and the weights must stay as they are. The operators are private to torch, whose version requirements.txt pins."""
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not where torch was built without oneDNN
    layers = [part for part in llm.modules() if isinstance(part, nn.Linear) or (part is llm.embed and llm.config.tie)]
    layers = [part for part in layers if there and part.weight.is_cpu and part.weight.dtype == torch.float and part.weight.numel() >= LARGE]
    try:
        for layer in layers:
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 32)  # for about so many rows
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("packed", None)


def rotate(x, cos, sin):
    """Rotary positions (2104.09864): a + ib becomes (a + ib) exp(i angle), a and b dimensions i and i + hd / 2; in x's dtype.

    x (N, T, heads, hd), cos and sin of the angles (N or 1, T, 1, hd), whose two halves are equal.
    """
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention of T new positions over their own past and over a prompt shared by G rows."""

    def __init__(self, c):
        super().__init__()
        self.H, self.K, self.hd = c.n_heads, c.n_kv_heads, c.d // c.n_heads
        self.wq = nn.Linear(c.d, self.H * self.hd, bias=False)
        self.wk, self.wv = (nn.Linear(c.d, self.K * self.hd, bias=False) for _ in range(2))
        self.wo = nn.Linear(self.H * self.hd, c.d, bias=False)

    def keys_values(self, x, rope):
        """x (N, T, D) -> keys, turned to their positions, and values, (N, K, T, hd) each."""
        k = rotate(linear(x, self.wk).unflatten(-1, (self.K, self.hd)), *rope)         # (N, T, K, hd)
        return k.transpose(1, 2), linear(x, self.wv).unflatten(-1, (self.K, self.hd)).transpose(1, 2)

    def forward(self, x, rope, bias=None, shared=None, shared_bias=None, cache=None, at=None):
        """x (N, T, D) -> (N, T, D), and this call's own keys and values. Without `shared` each position sees itself and what is before it.
        rope: cos and sin, as `rotate` wants them.

        shared: x are responses after prompts, whose keys and values these are, (B, K, P, hd) each; row n reads prompt n // G.
        shared_bias (B, 1, 1, P), bias (T, S), added to the scores, 0 or -inf: what x sees of its prompt, and of its response (S = T without
        cache).
        cache: preallocated keys and values of responses (2, N, K, longest, hd): these are written to its positions `at` (T,), and its
        first S are read, without gradient.
        """
        N, T, _ = x.shape
        q = rotate(linear(x, self.wq).view(N, T, self.H, self.hd), *rope)
        k, v = own = self.keys_values(x, rope)
        if shared is None:
            mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=True)      # (N, H, T, hd)
            return linear(mixed.transpose(1, 2).reshape(N, T, -1), self.wo), own
        if cache is not None:
            k, v = (kept.index_copy_(2, at, new)[:, :, :bias.shape[-1]] for kept, new in zip(cache, own))     # (N, K, S, hd)
        # The G rows of an utterance ask the same prompt, so their queries are stacked: `together` makes (B, K, G R T, any) of
        # (N, K, R T, any), `apart` undoes it. So the prompt is neither copied nor read G times. One softmax over prompt (far) and
        # response (near) is exp(score - top) / total, with a top and a total over both; top cancels, and needs no gradient.
        (pk, pv), R = shared, self.H // self.K
        B, RT = len(pk), R * T
        together = lambda x: x.view(B, N // B, self.K, RT, -1).transpose(1, 2).reshape(B, self.K, N // B * RT, -1)
        apart = lambda x: x.view(B, self.K, N // B, RT, -1).transpose(1, 2).reshape(N, self.K, RT, -1)
        q = (q / math.sqrt(self.hd)).transpose(1, 2).reshape(N, self.K, RT, self.hd)      # query head k R + r reads key head k
        near = ((q @ k.transpose(2, 3)).view(N, self.K, R, T, -1) + bias).flatten(2, 3)   # (N, K, R T, S)
        far = (together(q) @ pk.transpose(2, 3)).add_(shared_bias)            # (B, K, G R T, P), the largest tensor: in fp32 made once
        with torch.no_grad():
            top = torch.maximum(near.amax(-1, keepdim=True), apart(far.amax(-1, keepdim=True))).float()   # (N, K, R T, 1)
        near, far = (near.float() - top).exp(), far.float().sub_(together(top)).exp_()
        total = near.sum(-1, keepdim=True) + apart(far.sum(-1, keepdim=True))
        mixed = (near.to(v.dtype) @ v + apart(far.to(v.dtype) @ pv)) / total              # (N, K, R T, hd)
        mixed = mixed.to(x.dtype).view(N, self.H, T, self.hd).transpose(1, 2).reshape(N, T, -1)
        return linear(mixed, self.wo), own


class Layer(nn.Module):
    """Attention and SwiGLU, each after an RMSNorm and added to what came in."""

    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.d, c.norm_eps), RMSNorm(c.d, c.norm_eps)
        self.attn = Attention(c)
        self.gate, self.up = nn.Linear(c.d, c.ffn, bias=False), nn.Linear(c.d, c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.d, bias=False)

    def forward(self, x, rope, *context, kv_only=False):
        """x (N, T, D) -> (N, T, D), or with kv_only None; and this layer's own keys and values."""
        if kv_only:
            return None, self.attn.keys_values(self.norm1(x), rope)
        mixed, own = self.attn(self.norm1(x), rope, *context)
        x = x + mixed
        h = self.norm2(x)
        return x + linear(F.silu(linear(h, self.gate)) * linear(h, self.up), self.down), own


class Llama(nn.Module):
    """Embeddings (N, T, D) at positions (N or 1, T) -> hidden states (N, T, D) and each layer's keys and values. The rest: see Attention.

    With kv_only there are no hidden states: nobody reads a prompt's, only its keys and values, so the last layer's
    attention and feed-forward, nearly half of a prompt's cost at 2 layers, are left out.
    """

    def __init__(self, c):
        super().__init__()
        self.config, self.recompute = c, False  # recompute: forget what is inside a layer until the backward pass (checkpointing)
        self.embed = nn.Embedding(c.vocab, c.d)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(c.d, c.norm_eps)
        if not c.tie:
            self.head = nn.Linear(c.d, c.vocab, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        for layer in self.layers:  # what is added to the residual stream starts small (GPT-2)
            for p in (layer.attn.wo.weight, layer.down.weight):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layers))

    def forward(self, x, positions, bias=None, prompt=None, caches=None, at=None, kv_only=False):
        c, x = self.config, x.float()  # the residual stream is fp32, under FSDP too
        hd = c.d // c.n_heads
        freq = c.rope_theta ** (-torch.arange(0, hd, 2, device=x.device) / hd)
        angle = (positions[..., None] * freq).repeat(1, 1, 2)[:, :, None]      # (N or 1, T, 1, hd), fp32
        rope = angle.cos(), angle.sin()
        kv = []
        for i, layer in enumerate(self.layers):
            shared = (None, None) if prompt is None else (prompt.kv[i], prompt.bias)
            inputs = x, rope, bias, *shared, None if caches is None else caches[i], at
            last = kv_only and i + 1 == c.n_layers
            again = self.recompute and torch.is_grad_enabled() and not last
            x, own = checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs, kv_only=last)
            kv.append(own)
        return (None if kv_only else self.norm(x)), kv

    def logits(self, hidden):
        """(.., D) -> (.., V), fp32."""
        return linear(hidden, self.embed if self.config.tie else self.head).float()


def causal_bias(at, S):
    """(T, S): row i, the position at[i], is 0 up to column at[i], itself, and -inf after it."""
    return torch.where(length_mask(at + 1, S), 0.0, -math.inf)


class Prompt(NamedTuple):
    """What `prefill` leaves of B prompts: the keys and values of each layer, what is padding, how long they are."""
    kv: list             # per layer: keys and values, (B, K, P, hd) each
    bias: torch.Tensor   # (B, 1, 1, P): 0, or -inf on the padding
    length: torch.Tensor  # (B,) without padding

    def caches(self, N, longest):
        """Preallocated keys and values for N responses of up to `longest` tokens: per layer (2, N, K, longest, hd)."""
        return [k.new_zeros(2, N, k.shape[1], longest, k.shape[3]) for k, _ in self.kv]


# ---------------------------------------------------------------------------------------------- speech LM
class SpeechLM(nn.Module):
    """Frozen encoder -> linear projection -> Llama. The tokenizer's bytes travel with it."""

    def __init__(self, encoder_config, llama_config, tokenizer_bytes):
        super().__init__()
        self.encoder = Encoder(encoder_config)
        self.projection = nn.Linear(encoder_config.d, llama_config.d)
        self.llm = Llama(llama_config)
        self.tokenizer_bytes, self.tokenizer = tokenizer_bytes, load_tokenizer(tokenizer_bytes)
        self.configs = encoder_config, llama_config, tokenizer_bytes           # what `SpeechLM(*..)` needs to build this model again

    def forward(self, run):
        """run(self). DDP and FSDP do their work when a model's forward is called: a training pass is a function that comes in here."""
        return run(self)

    @torch.no_grad()
    def hear(self, mel, lengths):
        """Log-mel (B, T, M) -> the frozen encoder's frames (B, T / 4, D) and lengths in frames of 40 ms."""
        self.encoder.eval()
        return self.encoder(mel, lengths)

    def embed_prompt(self, frames, lengths, instructions=None):
        """The one place where a prompt of speech is built: frames (B, T, encoder's D) -> (B, P, D) padded on the right, and (B,) lengths.

        instructions: B strings, where one that is None, or no list at all, stands for the paper's of speech recognition.
        """
        texts = [text or INSTRUCTION for text in instructions or [None] * len(frames)]
        before = [[USER, BOS, *self.tokenizer.encode(text), S_BOS] for text in texts]
        embedded = self.llm.embed(torch.tensor([i for ids in before for i in ids] + [SYSTEM], device=frames.device))
        *before, after = embedded.split([*map(len, before), 1])
        heard = self.projection(frames)                                        # (B, T, D)
        rows = [torch.cat([b, row[:n], after]) for b, row, n in zip(before, heard, lengths.tolist())]
        lengths = lengths + torch.tensor([len(b) + 1 for b in before], device=lengths.device)
        return pad_sequence(rows, batch_first=True), lengths

    def prefill(self, x, length):
        """Runs B prompts x (B, P, D), padded on the right, of `length` (B,) through the decoder once -> Prompt.

        Padding comes after what is real, so none of that sees it, and SDPA's own causal mask, which skips half of the work, is all that is
        needed; who reads the prompt has the Prompt's bias.
        """
        P = x.shape[1]
        _, kv = self.llm(x, torch.arange(P, device=x.device)[None], kv_only=True)
        kv = [(k.contiguous(), v.contiguous()) for k, v in kv]  # or each product with them, of each step, would copy them
        return Prompt(kv, torch.where(length_mask(length, P), 0.0, -math.inf)[:, None, None], length)

    def extend(self, tokens, prompt=None, caches=None, start=0):
        """Hidden states (N, T, D) of response tokens (N, T), row n after prompt n // G; without a prompt, of plain text.

        With caches, these are positions start .. start + T of responses whose earlier part is in there. Where start is a tensor, all of
        a cache is read, and what is not written yet is masked: so every step has the same shapes, which a CUDA graph wants.
        """
        N, T = tokens.shape
        at = start + torch.arange(T, device=tokens.device)                     # (T,)
        if prompt is None:
            assert caches is None
            return self.llm(self.llm.embed(tokens), at[None])[0]
        positions = at + prompt.length.repeat_interleave(N // len(prompt.length))[:, None]                # (N, T)
        bias = causal_bias(at, caches[0].shape[3] if torch.is_tensor(start) else start + T)
        return self.llm(self.llm.embed(tokens), positions, bias, prompt, caches, at)[0]

    def token_logps(self, targets, prompt=None, temperature=1.0, chunk=None):
        """Log-probabilities (N, T) of targets (N, T) = x_1 .. <EOS>, and the entropy (N, T) there, in nats, fp32, at a temperature.

        The decoder is fed <BOS> x_1 ..; padding after <EOS> is seen by nobody before it, so mask it afterwards.
        Logits exist on the response only; where all would take over 256 MB, on `chunk` positions at a time, made again in the
        backward pass.
        """
        start = torch.full_like(targets[:, :1], BOS)
        hidden = self.extend(torch.cat([start, targets[:, :-1]], dim=1), prompt)          # (N, T, D)

        def score(hidden, targets):
            logits = self.llm.logits(hidden)                                   # (N, T, V), often the largest tensor: few passes over it
            logits = logits if temperature == 1 else logits / temperature
            norm = logits.logsumexp(-1)
            with torch.no_grad():
                entropy = norm - logits.softmax(-1).mul_(logits).sum(-1)
            return logits.gather(-1, targets[..., None])[..., 0] - norm, entropy

        chunk = chunk or max(1, 2**26 // (len(targets) * self.llm.config.vocab))
        if chunk >= targets.shape[1]:
            return score(hidden, targets)
        parts = [checkpoint(score, h, t, use_reentrant=False) for h, t in zip(hidden.split(chunk, 1), targets.split(chunk, 1))]
        return tuple(torch.cat(p, dim=1) for p in zip(*parts))

    def decode(self, tokens, lengths):
        """Token rows (N, T), valid for `lengths` (N,) -> N strings; <EOS> and the other control tokens are silent."""
        return self.tokenizer.decode([row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())])


def right_pad(rows, device=None):
    """Lists of token ids -> (B, max n) filled with PAD on the right, and lengths (B,)."""
    out = pad_sequence([torch.tensor(row or [PAD]) for row in rows], batch_first=True, padding_value=PAD)
    return out.to(device), torch.tensor([len(row) for row in rows]).to(device)


# ---------------------------------------------------------------------------------------------- decoding
def filter_logits(logits, top_k=None, top_p=1.0, min_p=0.0):
    """New logits (N, V) with everything outside the top k, the nucleus p or min_p * the best probability at -inf.

    top_k keeps k tokens, and those that tie with the k-th; top_p (Holtzman et al., 1904.09751) the fewest likeliest whose sum
    reaches p; min_p (2407.01082) those at least min_p times as likely as the best.
    """
    if top_k:
        worst = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst, -math.inf)
    if top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        p = ranked.softmax(-1)
        drop = p.cumsum(-1) - p >= top_p  # the sum before a token has already reached p
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)  # scatter: back in the vocabulary's order
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.max(-1, keepdim=True).values + math.log(min_p), -math.inf)
    return logits


@torch.no_grad()
def generate(model, prompt, G=1, max_new=48, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0, graph=False):
    """Samples G responses for each of B prompts; temperature 0 is greedy.

    Returns tokens (N, T) = x_1 .. <EOS> <PAD>.. with N = B * G and T <= max_new, lengths (N,) that count <EOS>, and
    the tokens' log-probabilities (N, T) under the distribution they were drawn from (0 on padding; greedy: at temperature
    1). A row without <EOS> has been truncated. The penalty (CTRL, 1909.05858) is on the response's own tokens.
    graph: on a GPU a CUDA graph, captured anew in each call, launches a whole step at once; steps have to be alike, so without the
    penalty. On a CPU the same steps run one by one.
    """
    assert not graph or repetition_penalty == 1
    N, device = len(prompt.length) * G, prompt.length.device
    caches = prompt.caches(N, max_new)
    tokens = torch.full((N, max_new), PAD, device=device)
    logps = torch.zeros(N, max_new, device=device)
    token = torch.full((N, 1), BOS, device=device)
    done = torch.zeros(N, dtype=torch.bool, device=device)
    lengths = torch.zeros(N, dtype=torch.long, device=device)
    at = torch.zeros(1, dtype=torch.long, device=device)  # t as the graph reads it

    def step(t):
        logits = model.llm.logits(model.extend(token, prompt, caches, at if graph else t))[:, -1]       # (N, V)
        if repetition_penalty != 1 and t:
            said = torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens[:, :t], True)
            logits = torch.where(said, torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)
        if temperature == 0:
            p, new = logits.softmax(-1), logits.argmax(-1, keepdim=True)
        else:
            p = filter_logits(logits / temperature, top_k, top_p, min_p).softmax(-1)      # (N, V)
            # The token in whose stretch of the summed probabilities a number from (0, 1] falls: on a CPU never one of probability 0; a
            # GPU's cumsum is not quite monotone.
            edge = p.cumsum(-1)
            new = torch.searchsorted(edge, edge[:, -1:] * (1 - torch.rand(N, 1, device=device)))
        logps.index_copy_(1, at, p.gather(1, new).log().masked_fill(done[:, None], 0.0))
        token.copy_(new.masked_fill(done[:, None], PAD))
        tokens.index_copy_(1, at, token)
        lengths.add_(~done)  # counted, not read off the tokens: nothing forbids a model to write <PAD> itself
        done.logical_or_(token[:, 0] == EOS)
        at.add_(1)

    replay = step
    with packed(model.llm):
        for t in range(max_new):
            replay(t)
            if t == 0 and graph and device.type == "cuda":
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured):  # records, runs nothing; autocast has its bf16 weights since the first step
                    step(1)
                replay = lambda t: captured.replay()
            if t % 4 == 3 and done.all():  # asking is a host synchronisation, so ask now and then
                break
    longest = int(lengths.max())
    return tokens[:, :longest], lengths, logps[:, :longest]


@torch.no_grad()
def beam_search(model, prompt, W=4, max_new=48, length_penalty=1.0):
    """The W best responses of each prompt, best first, by log-probability / length ** length_penalty (length counts <EOS>).

    A finished hypothesis stays in the beam, where it competes with what can still grow; so a beam as wide as the
    space is exhaustive search, and W = 1 is greedy. W may exceed V. Lengths are counted, not read off: a model may write <PAD> itself.
    Returns tokens (N, T) = x_1 .. <EOS> <PAD>.., T the longest, lengths (N,), scores (N,), N = B * W: row b W + w is prompt b's w-th best.
    """
    B, device, V = len(prompt.length), prompt.length.device, model.llm.config.vocab
    N = B * W
    caches = prompt.caches(N, max_new)
    tokens = torch.full((N, max_new), PAD, device=device)
    first_row = torch.arange(B, device=device)[:, None] * W                    # (B, 1): where each prompt's W rows begin
    logp = torch.full((N,), -math.inf, device=device)
    logp[::W] = 0  # W copies of nothing would find the same W hypotheses: begin with one
    lengths, done = torch.zeros(N, device=device), torch.zeros(N, dtype=torch.bool, device=device)
    token = torch.full((N,), BOS, device=device)
    only_pad = torch.where(torch.arange(V, device=device) == PAD, 0.0, -math.inf)
    with packed(model.llm):
        for t in range(max_new):
            step = model.llm.logits(model.extend(token[:, None], prompt, caches, t))[:, -1].log_softmax(-1)
            total = logp[:, None] + torch.where(done[:, None], only_pad, step)     # (N, V)
            lengths = lengths + ~done
            best = (total / lengths[:, None] ** length_penalty).view(B, W * V).topk(W, dim=1).indices      # (B, W), the best first
            rows, token = (first_row + best // V).flatten(), best.flatten() % V    # (N,): the parents, and what follows them
            logp, lengths, tokens = total[rows, token], lengths[rows], tokens[rows]
            tokens[:, t] = token
            done = done[rows] | (token == EOS)
            for cache in caches:  # the rows follow their parents; only the part that is written
                cache[:, :, :, :t + 1] = cache[:, rows, :, :t + 1]
            if t % 4 == 3 and done.all():
                break
    return tokens[:, :int(lengths.max())], lengths.long(), logp / lengths ** length_penalty
