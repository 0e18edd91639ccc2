"""Values and gradients of the losses in PyTorch, f64, written from the papers' formulas.

Run: python trainer/tests/golden/make_losses.py (torch 2.13, safetensors). It writes losses.safetensors
beside itself: `teacher`, `student` [2, 4, 19], `labels` [2, 4], `wide` [2, 4, 23] (a
teacher of another vocabulary), hidden states of two widths, and for each case `CASE.value` and
`CASE.grad`, the gradient of the mean over all positions. losses.json says for each case which kind
and settings it is, and which tensor is the teacher.

Losses that no public package of reference values covers are here; the others are compared with such
a package where its values are at hand. Nothing here shares code with the Rust side.
"""

import json
import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

torch.manual_seed(20)
torch.set_default_dtype(torch.float64)
B, T, V, WIDE, D = 2, 4, 19, 23, 6
teacher = 3.0 * torch.randn(B, T, V) - 1.0
student = 2.0 * torch.randn(B, T, V) + 0.5
wide = 2.5 * torch.randn(B, T, WIDE)
labels = torch.randint(0, V, (B, T))
labels[1, 2] = -100
teacher_hidden, student_hidden = torch.randn(B, T, D), 2 * torch.randn(B, T, D)


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def soft(x, tau=1.0):
    return F.softmax(x / tau, dim=-1)


def max_min(x):
    low, high = x.min(-1, keepdim=True).values, x.max(-1, keepdim=True).values
    return (x - low) / (high - low + 1e-6)


def standardize(x, unbiased, epsilon):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=unbiased) + epsilon)


def cross_entropy(t, s):
    return F.cross_entropy(s.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(B, T)


def jensen_shannon(t, s, beta, tau):
    p, q = soft(t, tau), soft(s, tau)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skew(p, q, alpha):
    return kl(p, alpha * p + (1 - alpha) * q)


def top(t, s, k):
    ids = t.topk(k, -1).indices
    return soft(t).gather(-1, ids), soft(s).gather(-1, ids), ids


def ghost(t, s, k):
    p, q, _ = top(t, s, k)
    bins = lambda x: torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1)
    return kl(bins(p), bins(q))


def uniform_tail(t, s, k):
    p, _, ids = top(t, s, k)
    rest = 1 - p.sum(-1, keepdim=True)
    target = (rest / (V - k)).expand_as(t).scatter(-1, ids, p)
    return kl(target, soft(s))


def dual_scaling(t, s, b, gamma, detach, per_sample, squared):
    dims = (-2, -1) if per_sample else -1
    st, ss = t.std(dims, keepdim=True, unbiased=False), s.std(dims, keepdim=True, unbiased=False)
    if detach:
        ss = ss.detach()
    return gamma * (b * b if squared else 1.0) * kl(soft(t / (st * b)), soft(s / (ss * b)))


def multi_level(t, s, taus, weight):
    t, s = t.flatten(0, 1), s.flatten(0, 1)
    total = 0
    for tau in taus:
        p, q = soft(t, tau), soft(s, tau)
        total = total + tau**2 * kl(p, q) + weight * ((p @ p.T - q @ q.T) ** 2).sum(-1)
    return total.view(B, T)


def dkd_original(t, s, tau, alpha, beta):
    y = torch.where(labels >= 0, labels, t.argmax(-1)).unsqueeze(-1)
    p, q = soft(t, tau), soft(s, tau)
    two = lambda x: torch.cat([x.gather(-1, y), 1 - x.gather(-1, y)], -1)
    others = torch.ones_like(t, dtype=torch.bool).scatter(-1, y, False)
    rest = lambda x: soft(x[others].view(B, T, V - 1), tau)
    return tau**2 * (alpha * kl(two(p), two(q)) + beta * kl(rest(t), rest(s)))


def atkd(t, s, share, lam):
    t, s, y = t.flatten(0, 1), s.flatten(0, 1), labels.flatten()
    has = y >= 0
    t, s, y = t[has], s[has], y[has].unsqueeze(-1)
    p, q, n = soft(t), soft(s), len(y)
    two = lambda x: torch.cat([x.gather(-1, y), 1 - x.gather(-1, y)], -1)
    others = torch.ones_like(t, dtype=torch.bool).scatter(-1, y, False)
    rest = lambda x: soft(x[others].view(n, V - 1))
    target, diversity = kl(two(p), two(q)), kl(rest(t), rest(s))
    order = (1 - p.gather(-1, y).squeeze(-1)).argsort(descending=True)
    hard = order[: math.ceil(share * n)]
    is_hard = torch.zeros(n, dtype=torch.bool)
    is_hard[hard] = True
    value = torch.where(
        is_hard,
        (1 - lam) * n / is_hard.sum() * (target + diversity),
        lam * n / (~is_hard).sum() * diversity,
    )
    return torch.zeros(B * T).masked_scatter(has, value).view(B, T)


def uld(t, s):
    p, q = soft(t).sort(-1, descending=True).values, soft(s).sort(-1, descending=True).values
    width = max(p.shape[-1], q.shape[-1])
    pad = lambda x: F.pad(x, (0, width - x.shape[-1]))
    return (pad(p) - pad(q)).abs().sum(-1)


CASES = {
    "cross-entropy": ("cross-entropy", {}, cross_entropy),
    "kl.squared": ("kl", {"temperature": 4, "temperature_squared": True}, lambda t, s: 16 * kl(soft(t, 4), soft(s, 4))),
    "kl.max-min": ("kl", {"tau": 0.2, "logits_norm": "max-min"}, lambda t, s: kl(soft(max_min(t), 0.2), soft(max_min(s), 0.2))),
    "reverse-kl": ("reverse-kl", {"temperature": 3}, lambda t, s: kl(soft(s, 3), soft(t, 3))),
    "reverse-kl.standardize": (
        "reverse-kl",
        {"logits_norm": "standardize"},
        lambda t, s: kl(soft(standardize(s, False, 1e-6)), soft(standardize(t, False, 1e-6))),
    ),
    "jensen-shannon": ("jensen-shannon", {"beta": 0.3, "temperature": 2}, lambda t, s: jensen_shannon(t, s, 0.3, 2)),
    "total-variation": ("total-variation", {"temperature": 2}, lambda t, s: 0.5 * (soft(t, 2) - soft(s, 2)).abs().sum(-1)),
    "skew-kl": ("skew-kl", {}, lambda t, s: skew(soft(t), soft(s), 0.1)),
    "skew-reverse-kl": ("skew-reverse-kl", {"alpha": 0.2}, lambda t, s: skew(soft(s), soft(t), 0.2)),
    "ghost-kl": ("ghost-kl", {"k": 5}, lambda t, s: ghost(t, s, 5)),
    "uniform-tail-kl": ("uniform-tail-kl", {"k": 5}, lambda t, s: uniform_tail(t, s, 5)),
    "dual-scaling": (
        "dual-scaling",
        {"scaling_value": 2},
        lambda t, s: dual_scaling(t, s, 2.0, 1.0, True, False, False),
    ),
    "dual-scaling.through": (
        "dual-scaling",
        {"scaling_value": 3, "gamma": 0.5, "detach_sigma": False, "temperature_squared": True},
        lambda t, s: dual_scaling(t, s, 3.0, 0.5, False, False, True),
    ),
    "dual-scaling.sample": (
        "dual-scaling",
        {"scaling_value": 2, "sigma": "sample"},
        lambda t, s: dual_scaling(t, s, 2.0, 1.0, True, True, False),
    ),
    "logit-standardization": (
        "logit-standardization",
        {},
        lambda t, s: 4 * kl(soft(standardize(t, True, 1e-7), 2), soft(standardize(s, True, 1e-7), 2)),
    ),
    "multi-level": ("multi-level", {"batch_weight": 3}, lambda t, s: multi_level(t, s, [2, 3, 4, 5, 6], 3.0)),
    "dkd.original": (
        "dkd",
        {"normalized": False, "temperature": 4, "alpha": 1, "beta": 8},
        lambda t, s: dkd_original(t, s, 4, 1, 8),
    ),
    "atkd": ("atkd", {}, lambda t, s: atkd(t, s, 0.5, 0.2)),
    "uld": ("uld", {}, uld),
    "uld.wide": ("uld", {"teacher": "wide"}, uld),
    "knowledge-alignment": (
        "knowledge-alignment",
        {"beta": 2, "hidden_norm": "standardize"},
        lambda t, s: 2 * (standardize(s, False, 1e-6) - standardize(t, False, 1e-6)).square().mean(-1),
    ),
    "patient-kd": ("patient-kd", {}, lambda t, s: (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1)),
    "hidden-cosine": ("hidden-cosine", {}, lambda t, s: 1 - F.cosine_similarity(s, t, dim=-1)),
}

HIDDEN = {"knowledge-alignment", "patient-kd", "hidden-cosine"}
tensors = {
    "teacher": teacher,
    "student": student,
    "wide": wide,
    "labels": labels,
    "teacher_hidden": teacher_hidden,
    "student_hidden": student_hidden,
}
about = {}
for case, (kind, settings, loss) in CASES.items():
    settings = dict(settings)
    of_teacher = {"wide": wide}.get(settings.pop("teacher", None), teacher)
    of_teacher, of_student = (teacher_hidden, student_hidden) if kind in HIDDEN else (of_teacher, student)
    leaf = of_student.clone().requires_grad_(True)
    value = loss(of_teacher, leaf)
    assert value.shape == (B, T), case
    (grad,) = torch.autograd.grad(value.mean(), leaf)
    tensors[f"{case}.value"], tensors[f"{case}.grad"] = value.detach(), grad
    about[case] = {"kind": kind, "set": settings, "teacher": "wide" if of_teacher is wide else "teacher"}

folder = pathlib.Path(__file__).parent
save_file(tensors, folder / "losses.safetensors")
(folder / "losses.json").write_text(json.dumps(about, indent=1) + "\n")
