"""The steps as a PyTorch user would assemble them: transformers, torch.compile, Liger's kernels."""

import argparse
import copy

import torch
from arms import LR, ROW, SHAPES, VOCAB, build_peer, depth, kept, timed


def peer(options: argparse.Namespace, *details: str, masks: int) -> dict:
    """transformers in bfloat16 with fused AdamW.

    details: compile = torch.compile; liger = its layers' kernels; checkpoint = activations made
    again; fused = Liger's linear KL in chunks of 4096, else logits are whole; microN = rows a pass;
    masks: rows of a search that share a window and its dense hidden states.
    """
    if "liger" in details:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3(
            rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False
        )
    layers, width = depth(options.shapes, options.layers), SHAPES[options.shapes][1]
    keep = kept(layers)
    torch.manual_seed(0)
    teacher = build_peer(options.shapes, layers)
    rows = options.tokens // ROW // masks
    micro = next((int(d[5:]) for d in details if d.startswith("micro")), rows)
    tokens = torch.randint(0, VOCAB, (rows, ROW), device="cuda")
    loss_fn = torch_loss("fused" in details)
    wrap = torch.compile if "compile" in details else lambda model: model

    def kl(student_body, student_head, dense, part):
        with torch.no_grad():
            known = dense(part).last_hidden_state.repeat_interleave(masks, 0)
        found = student_body(part.repeat_interleave(masks, 0)).last_hidden_state
        args = (found.flatten(0, 1), student_head, known.flatten(0, 1), teacher.lm_head.weight)
        return loss_fn(*args)

    if options.step == "search":
        body, parameters = masked_model(teacher.model, "checkpoint" in details)
        head = teacher.lm_head.weight
    else:
        student = build_peer(options.shapes, len(keep))
        picked = torch.nn.ModuleList(teacher.model.layers[i] for i in keep)
        student.model.layers.load_state_dict(picked.state_dict())
        for name in ("embed_tokens", "norm"):
            getattr(student.model, name).load_state_dict(getattr(teacher.model, name).state_dict())
        student.train().requires_grad_(True)
        if "checkpoint" in details:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        body, head, parameters = student.model, student.lm_head.weight, list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    check_peer(loss_fn, head, teacher.lm_head.weight, width)
    # Else Dynamo takes the check's few rows and the step's many for one dynamic dimension, and
    # Liger's own torch.compile ends in an IndexError of its guards (torch 2.11).
    torch.compiler.reset()
    torch.cuda.reset_peak_memory_stats()
    body, dense = wrap(body), wrap(teacher.model)
    said = None

    def step():
        nonlocal said
        said = 0.0
        for part in tokens.split(micro):
            loss = kl(body, head, dense, part) * (len(part) / rows)
            loss.backward()
            said = said + loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    first, seconds = timed(step, torch.cuda.synchronize)
    peak = torch.cuda.max_memory_allocated()
    return {"first": first, "seconds": seconds, "peak": peak, "kl": float(said)}


def torch_loss(fused: bool):
    """(student's h [N, D], its head [V, D], teacher's h, its head) -> KL(teacher || student)."""
    if fused:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        module = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, chunk_size=4096
        )

        def loss(h_q, head_q, h_p, head_p):
            none = torch.full((len(h_q),), -100, device=h_q.device)
            return module(h_q, head_q, h_p, head_p, none.clamp(min=0))

        return loss

    def dense_loss(h_q, head_q, h_p, head_p):
        logq = torch.log_softmax((h_q @ head_q.T).float(), -1)
        logp = torch.log_softmax((h_p @ head_p.T).float(), -1)
        return torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="batchmean")

    return dense_loss


def check_peer(loss_fn, head_q, head_p, width) -> None:
    """The loss of 256 random states is the textbook's in float32, within 2 %."""
    h_q, h_p = torch.randn(2, 256, width, device="cuda", dtype=torch.bfloat16).unbind()
    with torch.no_grad():
        logq, logp = (
            torch.log_softmax(h.float() @ head.float().T, -1)
            for h, head in ((h_q, head_q), (h_p, head_p))
        )
        wanted = (logp.exp() * (logp - logq)).sum(-1).mean()
    found = loss_fn(h_q.requires_grad_(), head_q, h_p, head_p)
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=1e-3)


def masked_model(model, checkpoint: bool):
    """The dense model with a gate a row and layer, 0 or 1 and differentiable; and the gates."""
    theta = torch.zeros(len(model.layers), device="cuda", requires_grad=True)

    class Gated(torch.nn.Module):
        def __init__(self, layer, number):
            super().__init__()
            self.layer, self.number = layer, number

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("layer"), name)

        def forward(self, h, *args, **kwargs):
            def run(h):
                out = self.layer(h, *args, **kwargs)
                return out[0] if isinstance(out, tuple) else out

            if checkpoint:
                y = torch.utils.checkpoint.checkpoint(run, h, use_reentrant=False)
            else:
                y = run(h)
            soft = torch.sigmoid(theta[self.number]).expand(len(h))
            hard = (torch.arange(len(h), device=h.device) + self.number) % 4 != 2
            gate = (hard.float() - soft.detach() + soft).to(h.dtype)[:, None, None]
            return h + gate * (y - h)

    gated = copy.copy(model)
    gated._modules = dict(model._modules)
    gated.layers = torch.nn.ModuleList(Gated(x, i) for i, x in enumerate(model.layers))
    return gated, [theta]
