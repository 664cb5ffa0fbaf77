"""temporary"""

import torch


def tree_causal_conv1d(x, weight, bias, activation, plan, initial=None):
    w = weight.shape[-1]
    before = x.new_zeros(1, x.shape[1], w - 1) if initial is None else initial
    full = torch.cat([before, x], -1)
    anc = plan.ancestors(w - 1, x.device)
    out = x * weight[:, -1, None]
    for j in range(w - 1):
        out = out + full[:, :, anc[:, j]] * weight[:, w - 2 - j, None]
    if bias is not None:
        out = out + bias[:, None]
    if activation is not None:
        out = activation(out)
    leaves = torch.from_numpy(plan.leaves).to(x.device)
    idx = torch.cat([leaves[:, None] + w - 1, anc[leaves]], 1)[:, : w - 1].flip(1)
    return out, full[0][:, idx].transpose(0, 1)
