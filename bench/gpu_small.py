"""One small case of every kernel, for compute-sanitizer: odd sizes, so that every edge is met."""

from __future__ import annotations

import torch

from blaq_kernels.codebook import levels_of

HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0, "max_iter": 3}


def main() -> None:
    ops, levels = torch.ops.blaq, levels_of("pow2", 2)
    torch.manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    n, k = 45, 210  # together more than a short group: one scale for all takes the kernels of long ones
    latent, curvature = normal(n, k), normal(n, k).abs() + 0.1
    ops.scaled_update(latent, latent, curvature)
    ops.blend(latent, curvature, 0.6)
    for group_size in (0, -1, 32):
        for method in ("alternating", "exact"):
            codes, scale = ops.solve(latent, curvature, None, levels, group_size, 3, method)
        qweight = ops.pack(codes, 2)
        ops.fake_quantize(latent, scale, levels, group_size)
        ops.unpack(qweight, scale, levels, group_size, k, torch.bfloat16)
        for m in (1, 40, 200, 2000):
            x, bias = normal(m, k, dtype=torch.bfloat16), normal(n, dtype=torch.bfloat16)
            ops.packed_linear(x, qweight, scale, bias, levels, group_size)
        # One scale for 41041 weights: CUDA C++ kernels cut them into parts, those for 9450 do not.
        shapes = [(n, k), (41, 1001)] if group_size == 0 else [(n, k)]
        lists = {"params": [normal(*s) for s in shapes], "grads": [normal(*s) for s in shapes],
                 "latents": [normal(*s) for s in shapes], "exp_avgs": [normal(*s) for s in shapes],
                 "exp_avg_sqs": [normal(*s).square() for s in shapes],
                 "scales": [scale.clone() for _ in shapes]}
        scalars = {name: torch.tensor(value, device="cuda")
                   for name, value in (("lr", 1e-3), ("step", 2.0), ("found_inf", 0.0))}
        for method in ("alternating", "exact"):
            tail = {**HYPER, **scalars, "levels": levels, "group_size": group_size, "method": method}
            ops.fused_trial(**lists, **tail)
            ops.fused_step(**lists, trial_grads=[normal(*s) for s in shapes], **tail,
                           backtrack=torch.tensor(0.6, device="cuda"),
                           flips=torch.zeros(len(shapes), dtype=torch.int64, device="cuda"))
    k = 2051  # long enough to be split
    qweight = ops.pack(torch.randint(0, 4, (n, k), dtype=torch.uint8, device="cuda"), 2)
    ops.packed_linear(normal(1, k, dtype=torch.bfloat16), qweight, torch.rand(1, device="cuda"), None,
                      levels, 0)
    qweight = ops.pack(torch.randint(0, 4, (20, 27), dtype=torch.uint8, device="cuda"), 2)
    scale = torch.rand(20, 1, device="cuda")
    for layout in (torch.contiguous_format, torch.channels_last):
        x = normal(2, 3, 9, 7, dtype=torch.bfloat16).contiguous(memory_format=layout)
        ops.packed_conv2d(x, qweight, scale, None, levels, -1, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
