import torch

from dit_accel.pipelines.mini.locality import PLAN, PositionProbe
from dit_accel.pipelines.mini.model import build_transformer


def first_attention(model, tokens, rope):
    """Attention weights (heads, N, N) of the first block for equal tokens: only the biases speak."""
    from dit_accel.pipelines.mini.attention import _rotate

    attn = model.blocks[0].attn1
    q, k = (
        norm(f(tokens)).unflatten(-1, (attn.heads, -1))
        for norm, f in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
    )
    cos, sin = rope[0][..., 0::2], rope[1][..., 1::2]
    q, k = (_rotate(x, cos, sin)[0].transpose(0, 1) for x in (q, k))
    return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)


def test_heads_begin_with_their_neighbour():
    model = build_transformer(128, 32, layers=1, channels=4, text_dim=16)
    frames, height, width = 3, 6, 7
    rope = model.rope(torch.zeros(1, 4, frames, height, width))
    weights = first_attention(model, torch.zeros(1, frames * height * width, 128), rope)
    y, x = 2, 3
    token = (1 * height + y) * width + x
    for head, (dx, dy, _) in enumerate(PLAN[0]):
        frame, place = divmod(int(weights[head, token].argmax()), height * width)
        assert (frame, *divmod(place, width)) == (1, y + dy, x + dx)


def test_probe_learns_positions_and_lets_go_of_the_states():
    torch.manual_seed(0)
    model = build_transformer(64, 32, layers=1, channels=4, text_dim=16)
    probe = PositionProbe(model, 0)
    inputs = (torch.randn(2, 4, 3, 4, 5), torch.tensor([500.0, 500.0]), torch.zeros(2, 3, 16))
    model(*inputs)
    loss = probe.loss(torch.tensor([[0, 3, 8]] * 2), 9, 4, 5)
    loss.backward()
    assert probe._hidden is None
    with torch.no_grad():
        model(*inputs)
    assert probe._hidden is None
