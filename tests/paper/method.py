"""Draws the method as one picture for the README: python tests/paper/method.py tests/results/method.png"""
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BASE, TEACHER, STUDENT = "#444444", "#d1603d", "#1f6f8b"


def main(path):
    figure, axes = plt.subplots(figsize=(8.2, 3.7))
    kl = [0.0, 0.35, 1.0, 2.0, 3.2, 4.5, 5.8]
    accuracy = [0.0, 0.9, 1.75, 2.35, 2.55, 2.35, 1.9]
    axes.axvspan(-0.25, 1.6, color=STUDENT, alpha=0.07)
    axes.text(1.55, -0.42, "trust region around $\\pi_{old}$ (Eq. 7)", fontsize=8, color=STUDENT, ha="right")
    axes.plot(kl, accuracy, "o-", color=TEACHER, markersize=4)
    axes.plot(0, 0, "s", color=BASE, markersize=10)
    axes.plot(1.05, 2.45, "*", color=STUDENT, markersize=20, zorder=3)
    axes.annotate("", (0.93, 2.3), (0.07, 0.2), arrowprops=dict(arrowstyle="-|>", color=STUDENT, linewidth=2))
    axes.annotate("", (1.35, 2.55), (5.6, 2.05), arrowprops=dict(
        arrowstyle="-|>", color=TEACHER, linestyle="--", connectionstyle="arc3,rad=0.17"))
    axes.text(0.2, -0.12, "0  $\\pi_{old}$ samples and grades one batch", fontsize=9, color=BASE, va="center")
    axes.text(3.0, 1.35, "1  teacher $\\pi_e$: dozens of steps on that batch;\n    gains, then drifts",
              fontsize=9, color=TEACHER, va="center")
    axes.text(3.6, 3.25, "its signal per token, $\\hat{A}=\\log\\pi_e-\\log\\pi_{old}$, whitened", fontsize=9,
              color=TEACHER, ha="center")
    axes.text(0.72, 2.95, "2  student: back to $\\pi_{old}$,\n    10 to 32 clipped steps", fontsize=9,
              color=STUDENT, ha="center")
    axes.set(xlabel="reverse KL to $\\pi_{old}$", ylabel="accuracy", xticks=[], yticks=[],
             xlim=(-0.25, 6.3), ylim=(-0.6, 3.5))
    axes.set_title("The method, drawn; not a measurement", fontsize=9, loc="right", color="#888888")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
