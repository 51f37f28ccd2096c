"""What a student learns from a teacher's distributions. Legend: N tokens, V vocabulary."""

from __future__ import annotations

from typing import Literal

import torch

Direction = Literal["forward_kl", "reverse_kl"]


def token_kl(student_NV: torch.Tensor, teacher_NV: torch.Tensor, direction: Direction) -> torch.Tensor:
    """kl_N, float32, in nats, between the distributions that two models' logits give: the whole sum over the vocabulary.

    forward_kl: KL(teacher || student), whose student covers all that the teacher does (Hinton et al., arXiv 1503.02531).
    reverse_kl: KL(student || teacher), whose student keeps to what the teacher finds likely (MiniLLM, arXiv 2306.08543).
    No gradient flows to the teacher. Columns that only one of them has, which pad a vocabulary to a round number, are left out.
    """
    width = min(student_NV.shape[-1], teacher_NV.shape[-1])
    student_NV = student_NV[:, :width].float().log_softmax(-1)
    teacher_NV = teacher_NV[:, :width].detach().float().log_softmax(-1)
    if direction == "forward_kl":
        return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1)
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)
