"""The codebook autoencoder: the layout, the nearest word, and gradients that pass it."""

import pytest
import torch
from peers import peer

from vdiff.first_stages import Codebook, VQAutoencoder

TINY = dict(num_words=16, channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_layout_is_that_of_latent_diffusion():
    """Parameters of the f 4 and f 8 models as their configs make them: one quant_conv channel per code channel."""
    with torch.device("meta"):
        f4 = VQAutoencoder()
        f8 = VQAutoencoder(16384, channel_mult=(1, 2, 2, 4), latent_channels=4, attention_factors=(8,))
    names = f4.state_dict()
    assert names["quantize.embedding.weight"].shape == (8192, 3) and names["quant_conv.weight"].shape == (3, 3, 1, 1)
    assert names["encoder.conv_out.weight"].shape == (3, 512, 3, 3)
    assert "encoder.down.3.attn.1.q.weight" in f8.state_dict() and "decoder.up.3.attn.2.q.weight" in f8.state_dict()


def test_every_vector_gets_the_nearest_word():
    book, z = Codebook(16, 3), draw(2, 3, 4, 4)
    torch.nn.init.normal_(book.embedding.weight)
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 3)
    want = [min(range(16), key=lambda i: (book.embedding.weight[i] - v).square().sum().item()) for v in vectors]
    assert book(z).flatten().tolist() == want
    assert torch.equal(book(book.words(book(z))), book(z))


def test_decoding_depends_on_the_word_alone():
    model = VQAutoencoder(**TINY, scale=3.0, shift=0.5).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    z = model.quantize.words(model.quantize(draw(1, 3, 4, 4)))
    with torch.no_grad():
        assert torch.allclose(model.decode(model.latents(z)), model.decode(model.latents(z + 1e-3)))
        assert torch.allclose(model.decode(model.latents(z)), model.pixels(z), atol=1e-6)


def test_the_gradient_passes_the_codebook_as_if_it_were_not_there():
    model, x = VQAutoencoder(**TINY), draw(1, 3, 8, 8)
    found = model.reconstruct(x)
    z = model.said(x).detach().requires_grad_()
    words = model.quantize.words(model.quantize(z))
    model.pixels(z + (words - z).detach()).square().mean().backward()
    through = torch.autograd.grad(found.pixels.square().mean(), model.quant_conv.bias, retain_graph=True)[0]
    assert torch.allclose(through, z.grad.sum((0, 2, 3)), atol=1e-7)
    assert torch.autograd.grad(found.pixels.sum(), model.quantize.embedding.weight, allow_unused=True)[0] is None


def test_the_codebook_follows_vectors_and_vectors_the_codebook():
    model, x = VQAutoencoder(**TINY), draw(2, 3, 8, 8)
    found = model.reconstruct(x)
    assert torch.equal(found.penalties["codebook"], found.penalties["commitment"])
    book, encoder = model.quantize.embedding.weight, model.quant_conv.weight
    codebook, commitment = found.penalties["codebook"].sum(), found.penalties["commitment"].sum()
    for loss, moved, still in ((codebook, book, encoder), (commitment, encoder, book)):
        grads = torch.autograd.grad(loss, [moved, still], retain_graph=True, allow_unused=True)
        assert grads[0].abs().max() > 0 and grads[1] is None


def test_the_words_are_those_of_diffusers():
    quantizer = peer("diffusers.models.autoencoders.vq_model").VectorQuantizer(16, 3, beta=0.25, legacy=False)
    book, z = Codebook(16, 3), draw(2, 3, 4, 4)
    quantizer.embedding.weight.data = book.embedding.weight.data
    words, loss, (_, _, index) = quantizer(z)
    assert torch.equal(index.view(2, 4, 4), book(z)) and torch.allclose(words, book.words(book(z)), atol=1e-6)
    distance = (z - book.words(book(z))).square().mean()
    assert loss.item() == pytest.approx(1.25 * distance.item(), rel=1e-5)
