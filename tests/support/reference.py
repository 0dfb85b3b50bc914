"""Late-to-Early Training in plain PyTorch: explicit formulas, autograd, one process. What everything is compared with.

Shape legend: B batch, L sequence, D width, N heads, H head width, V vocabulary.
"""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


def llama(params, tokens_BL, positions_BL, *, num_layers, num_heads, theta=10_000.0):
    """Outputs of all blocks (the residual stream) and of the final norm; the parameters have torchtitan's names."""
    x_BLD = params["tok_embeddings.weight"][tokens_BL]
    mask_B1LL = document_mask(positions_BL)
    hidden = []
    for i in range(num_layers):
        block = {k.removeprefix(f"layers.{i}."): v for k, v in params.items() if k.startswith(f"layers.{i}.")}
        normed = rms_norm(x_BLD, block["attention_norm.weight"])
        x_BLD = x_BLD + attention(block, normed, positions_BL, mask_B1LL, num_heads, theta)
        normed = rms_norm(x_BLD, block["ffn_norm.weight"])
        gate = F.silu(normed @ block["feed_forward.w1.weight"].T)
        x_BLD = x_BLD + (gate * (normed @ block["feed_forward.w3.weight"].T)) @ block["feed_forward.w2.weight"].T
        hidden.append(x_BLD)
    return hidden, rms_norm(x_BLD, params["norm.weight"])


def rms_norm(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def document_mask(positions_BL):
    """True where a token may look: at or before itself, within its own document (position 0 starts one)."""
    document_BL = (positions_BL == 0).cumsum(-1)
    same = document_BL[:, :, None] == document_BL[:, None, :]
    return (same & torch.ones(positions_BL.shape[1], positions_BL.shape[1], dtype=torch.bool).tril())[:, None]


def attention(block, x_BLD, positions_BL, mask_B1LL, num_heads, theta):
    B, L, D = x_BLD.shape
    H = D // num_heads
    if "attention.qkv_linear.wqkv.weight" in block:  # fused: per head q, k, v
        qkv = (x_BLD @ block["attention.qkv_linear.wqkv.weight"].T).view(B, L, num_heads, 3, H)
        q, k, v = qkv.unbind(-2)
    else:
        q, k, v = (
            (x_BLD @ block[f"attention.qkv_linear.{w}.weight"].T).view(B, L, num_heads, H) for w in ("wq", "wk", "wv")
        )
    q, k = rotate(q, positions_BL, theta), rotate(k, positions_BL, theta)
    scores_BNLL = torch.einsum("blnh,bmnh->bnlm", q, k) / H**0.5
    weights = scores_BNLL.masked_fill(~mask_B1LL, float("-inf")).softmax(-1)
    return torch.einsum("bnlm,bmnh->blnh", weights, v).reshape(B, L, D) @ block["attention.wo.weight"].T


def rotate(x_BLNH, positions_BL, theta):
    """Rotary embedding of adjacent pairs of channels."""
    H = x_BLNH.shape[-1]
    frequency = theta ** (-torch.arange(0, H, 2).float() / H)
    angle = positions_BL[..., None, None] * frequency
    even, odd = x_BLNH[..., 0::2], x_BLNH[..., 1::2]
    rotated = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], dim=-1)
    return rotated.flatten(-2)


def let_loss(
    student,
    teacher,
    batch,
    *,
    student_shape,
    teacher_shape,
    block,
    weight,
    projector_DE=None,
    retokenize=None,
    per_target=False,
):
    """L_NLL, L_NLL + lambda * L_align and the mean cosine of a batch [B, L], each over its number of valid tokens.

    `retokenize`, for a teacher with another tokenizer: batch -> the teacher's tokens and positions [B, T], and which of
    them each token meets [B, L], -1: none. The mean cosine is then that of the tokens that meet one, and with
    `per_target` L_align is over their number too.

    And how the gradients of the two losses with respect to the block's output agree: (cosine, ratio of norms).
    """
    tokens_BL, positions_BL, labels_BL = batch
    valid_BL = labels_BL != IGNORE_INDEX
    hidden, final_BLD = llama(student, tokens_BL, positions_BL, **student_shape)
    logits_BLV = final_BLD @ student["lm_head.weight"].T
    nll = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    counts_BL = valid_BL
    with torch.no_grad():
        if retokenize is None:
            _, target_BLE = llama(teacher, tokens_BL, positions_BL, **teacher_shape)
        else:
            *teacher_batch, index_BL = retokenize(batch)
            _, states_BTE = llama(teacher, *teacher_batch, **teacher_shape)
            target_BLE = torch.stack([states[index] for states, index in zip(states_BTE, index_BL, strict=True)])
            counts_BL = valid_BL & (index_BL >= 0)
    a_BLD = hidden[block]
    if projector_DE is None:
        target_BLD = F.interpolate(target_BLE, size=a_BLD.shape[-1], mode="linear", align_corners=False)
    else:
        target_BLD = target_BLE @ projector_DE.T
    cosine_BL = F.cosine_similarity(a_BLD, target_BLD, dim=-1)
    nll, align = nll / valid_BL.sum(), -(cosine_BL * counts_BL).sum() / (counts_BL if per_target else valid_BL).sum()
    own, added = (torch.autograd.grad(loss, a_BLD, retain_graph=True)[0].flatten() for loss in (nll, weight * align))
    agreement = (F.cosine_similarity(own, added, dim=0).item(), (added.norm() / own.norm()).item())
    return nll, nll + weight * align, (cosine_BL * counts_BL).sum() / counts_BL.sum(), agreement


PROJECTOR = "let_projector_0.weight"


def train(initial, teacher, batches, lrs, *, weight, stop_step, **shapes):
    """Trains from `initial` with AdamW and clipping, as torchtitan's default does, one batch a step.

    A weight of the name `PROJECTOR` is a learned projector, and trained alike. Returns per step the clipped gradients,
    L_NLL and the mean cosine, and the final weights.
    """
    weights = {name: p.clone().requires_grad_() for name, p in initial.items()}
    student = {name: p for name, p in weights.items() if name != PROJECTOR}
    optimizer = torch.optim.AdamW(weights.values(), lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    steps = []
    for step, (batch, lr) in enumerate(zip(batches, lrs, strict=True)):
        now = weight * max(0, stop_step - step) / stop_step
        nll, loss, cosine, agreement = let_loss(
            student, teacher, batch, weight=now, projector_DE=weights.get(PROJECTOR), **shapes
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        gradients = {name: p.grad.clone() for name, p in weights.items()}
        steps.append({"gradients": gradients, "loss": nll.item(), "cosine": cosine.item(), "agreement": agreement})
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return steps, {name: p.detach() for name, p in weights.items()}
