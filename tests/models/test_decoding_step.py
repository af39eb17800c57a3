"""A step at fixed addresses, and as a CUDA graph, says what the library says: captions of every length, in any order, while
the weights change."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_blip_attention import eager_and_fast, random_images
from test_decoding import OPTIONS

from models import decoding_step
from models.decoding import generate

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU: a step is captured on one only")
LONGER = {"longer than the first room": {"num_beams": 3, "max_new_tokens": 40, "min_new_tokens": 40}}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """On a CPU the same operations are run one by one, which shows that they are the right ones."""
    monkeypatch.setattr(decoding_step, "DEVICES", {"cpu", "cuda"})


def prompts(images: int, device="cpu") -> dict:
    ids = torch.randint(4, 100, (images, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, 0] = mask[1, 0] = mask[1, 1] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def both(eager, fast, images, seed=7, **options):
    said = []
    for model in (eager, fast):
        torch.manual_seed(seed)
        given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        said.append(generate(model, pixel_values=images, **given))
    return said


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True, "num_return_sequences": 3}])
@pytest.mark.parametrize("prompted", [False, True])
def test_a_caption_outgrows_its_room_again_and_again(monkeypatch, options, prompted):
    eager, fast = eager_and_fast()
    options = options | {"max_new_tokens": 19, "min_new_tokens": 19} | (prompts(6) if prompted else {})
    monkeypatch.setattr(decoding_step, "ROOM", 6 if prompted else 2)
    theirs, ours = both(eager, fast, random_images(6), **options)
    assert torch.equal(ours, theirs)


def test_the_rooms_are_used(monkeypatch):
    """What the test above is about: five tokens, of which the last is never read, and rooms of 2 and 4."""
    rooms, init = [], decoding_step.FixedCache.__init__
    counted = lambda self, layers, rows, heads, room, *rest, **kind: (  # noqa: E731
        rooms.append(room), init(self, layers, rows, heads, room, *rest, **kind))[-1]  # fmt: skip
    monkeypatch.setattr(decoding_step.FixedCache, "__init__", counted)
    _, fast = eager_and_fast()
    rooms.clear()
    monkeypatch.setattr(decoding_step, "ROOM", 2)
    generate(fast, pixel_values=random_images(1), max_new_tokens=5, min_new_tokens=5)
    assert rooms == [2, 4, 8]


def test_elsewhere_and_with_an_adapter_decoding_is_as_it_was(monkeypatch):
    def taken(model) -> bool:
        found = generate(model, pixel_values=random_images(1), max_new_tokens=3, return_dict_in_generate=True)
        return hasattr(getattr(found, decoding_step.CACHE), "step")

    _, fast = eager_and_fast()
    assert taken(fast)
    monkeypatch.setattr(decoding_step, "DEVICES", {"cuda"})
    assert not taken(fast)
    monkeypatch.setattr(decoding_step, "DEVICES", {"cpu"})
    get_peft_model(fast, LoraConfig(r=2, target_modules=["query"]))
    assert not taken(fast)


def test_speculative_decoding_keeps_the_librarys_cache():
    """It reads several tokens at once, and takes some of them back."""
    eager, fast = eager_and_fast()
    repeating = {"input_ids": torch.tensor([[118, 20, 21, 22, 20, 21, 22, 20, 0]]), "prompt_lookup_num_tokens": 3}
    theirs, ours = both(eager, fast, random_images(1), max_new_tokens=14, **repeating)
    assert torch.equal(ours, theirs)


def test_hidden_states_are_returned_when_asked_for():
    eager, fast = eager_and_fast()
    asked = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 6}
    theirs, ours = both(eager, fast, random_images(2), **asked)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine[-1], other[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("prompted", [False, True], ids=["", "prompted"])
@pytest.mark.parametrize("options", (OPTIONS | LONGER).values(), ids=OPTIONS | LONGER)
def test_every_option_gives_the_librarys_token_ids(options, prompted, device):
    eager, fast = (model.to(device) for model in eager_and_fast())
    options = {"max_new_tokens": 12} | options
    for images in (4, 9, 4):  # other tensors, then the first again
        pixels = random_images(images).to(device)
        theirs, ours = both(eager, fast, pixels, **options, **(prompts(images, device) if prompted else {}))
        assert torch.equal(ours, theirs)
    if device == "cuda" and options.get("use_cache", True):
        assert graphs(fast)


@gpu
def test_a_graph_reads_the_weights_as_they_are_now():
    eager, fast = (model.cuda() for model in eager_and_fast())
    pixels = random_images(6).cuda()
    before, _ = both(eager, fast, pixels, num_beams=3, max_new_tokens=12)
    with torch.no_grad():
        for model in (eager, fast):
            model.text_decoder.cls.predictions.bias[5:50] += 3  # as an optimizer's step does, in place
    theirs, ours = both(eager, fast, pixels, num_beams=3, max_new_tokens=12)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, before)
    fast.text_decoder.bert.embeddings.word_embeddings.weight = torch.nn.Parameter(  # at another address
        eager.text_decoder.bert.embeddings.word_embeddings.weight.detach().clone()
    )
    theirs, ours = both(eager, fast, pixels, num_beams=3, max_new_tokens=12)
    assert torch.equal(ours, theirs)


@gpu
def test_two_generations_at_once_have_a_graph_each():
    eager, fast = (model.cuda() for model in eager_and_fast())
    kept = []
    for seed in range(3):  # its cache is in use as long as the output is kept
        pixels = random_images(4, seed).cuda()
        theirs, ours = both(eager, fast, pixels, max_new_tokens=9, num_beams=2, return_dict_in_generate=True)
        assert torch.equal(ours.sequences, theirs.sequences)
        kept.append((ours, getattr(ours, decoding_step.CACHE).self_attention_cache.states.clone()))
    assert len({id(getattr(ours, decoding_step.CACHE).step) for ours, _ in kept}) == 3
    assert all(getattr(ours, decoding_step.CACHE).self_attention_cache.states.equal(states) for ours, states in kept)
    del kept, ours, theirs
    assert len(graphs(fast)) == 1  # made for the same
    decoding_step.release_graphs()
    assert not graphs(fast)


@gpu
def test_under_autocast_a_graph_says_what_its_operations_say(monkeypatch):
    _, fast = eager_and_fast()
    fast, pixels = fast.cuda(), random_images(8).cuda()
    said = []
    for captured in (True, True, False):
        monkeypatch.setattr(decoding_step, "DEVICES", {"cuda"} if captured else set())
        with torch.autocast("cuda", dtype=torch.bfloat16):
            said.append(generate(fast, pixel_values=pixels, num_beams=3, max_new_tokens=12))
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[0], said[2])


@gpu
def test_what_hooks_do_is_not_lost():
    _, fast = eager_and_fast()
    fast, pixels, calls = fast.cuda(), random_images(2).cuda(), []
    layer = fast.text_decoder.bert.encoder.layer[0]
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    generate(fast, pixel_values=pixels, max_new_tokens=6, min_new_tokens=6)
    assert len(calls) == 6
    assert not graphs(fast)
    hook.remove()


@gpu
def test_with_an_operation_that_no_graph_can_have_captions_are_the_same(monkeypatch, caplog):
    eager, fast = (model.cuda() for model in eager_and_fast())

    def waits(self, decoder, run=decoding_step.Step._run):
        run(self, decoder)
        torch.cuda.synchronize()  # not allowed while a graph is captured
        return run(self, decoder)

    monkeypatch.setattr(decoding_step, "_can_capture", True)
    monkeypatch.setattr(decoding_step.Step, "_run", waits)
    theirs, ours = both(eager, fast, random_images(4).cuda(), num_beams=3, max_new_tokens=12)
    assert torch.equal(ours, theirs)
    assert "not captured as a CUDA graph" in caplog.text
    assert not decoding_step._can_capture
    dropped = torch.nn.functional.dropout(torch.ones(1000, device="cuda"))  # a generator in a capture refuses
    assert 300 < (dropped == 0).sum() < 700


def graphs(model) -> dict:
    return decoding_step._free.get(model.text_decoder, {})
