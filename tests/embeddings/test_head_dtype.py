"""The dtype rule: chosen in one place, recorded, and the same whatever the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import StackedEmbeddings, TransformerDocumentEmbeddings, TransformerWordEmbeddings
from flair.models import MultitaskModel, SequenceTagger, TextClassifier, TokenClassifier
from flair.nn import Classifier, Model
from flair.trainers import ModelTrainer
from transformers import AutoModel, AutoTokenizer

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerEmbeddings, PeftTransformerWordEmbeddings
from flair_peft.embeddings.head_dtype import has_castable_head
from flair_peft.errors import AdapterConfigError, DtypeMismatchError
from flair_peft.primitives.dtypes import dtype_name, parse_dtype, requested_dtype
from tests.support.classic import tagger
from tests.support.configs import lora
from tests.support.round_trip import SCORE_TOLERANCE, Factories, largest_difference
from tests.support.zoo import ZOO

LORA = lora()
SENTENCES = ["Berlin is large .", "I love it !"]


def labels() -> Dictionary:
    dictionary = Dictionary(add_unk=False)
    for label in ("A", "B", "C"):
        dictionary.add_item(label)
    return dictionary


def classifier(embeddings: Any) -> TextClassifier:
    return TextClassifier(embeddings, label_dictionary=labels(), label_type="kind")


def round_trip(model: Model, directory: Path) -> Any:
    model.save(directory / "model.pt")
    return Classifier.load(directory / "model.pt")


def predict(model: Model) -> list[list[float]]:
    sentences = [Sentence(text) for text in SENTENCES]
    model.eval()
    model.predict(sentences, return_probabilities_for_all_classes=True)
    return [[label.score for label in sentence.get_labels()] for sentence in sentences]


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtype_in_any_spelling_is_the_same(spelling: Any) -> None:
    """A name, a qualified name and the dtype itself mean one dtype, and its stored name is the short one."""
    assert parse_dtype(spelling) is torch.bfloat16
    assert dtype_name(parse_dtype(spelling)) == "bfloat16"


@pytest.mark.parametrize("nonsense", ["int8", "banana", torch.int64, "nn", 16])
def test_dtype_that_is_no_floating_point_is_refused(nonsense: Any) -> None:
    """The error shows what was given."""
    with pytest.raises(AdapterConfigError, match="no floating-point dtype"):
        parse_dtype(nonsense)


def test_requested_dtype_comes_from_any_of_its_names() -> None:
    """``dtype=``, and ``dtype`` or ``torch_dtype`` among keyword arguments; two that agree are one."""
    assert requested_dtype(None, {}) is None
    assert requested_dtype("bfloat16", {"torch_dtype": torch.bfloat16}) is torch.bfloat16
    assert requested_dtype(None, {}, {"dtype": "auto"}) == "auto"
    with pytest.raises(AdapterConfigError, match=r"torch\.bfloat16 and torch\.float16"):
        requested_dtype("bfloat16", {"torch_dtype": "float16"})


def test_dtype_auto_keeps_that_of_the_files(base: Callable[[str], str], tmp_path: Path) -> None:
    """A base that was saved in bf16 stays in bf16 when asked to, and is fp32 without asking."""
    AutoModel.from_pretrained(base("bert"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base("bert")).save_pretrained(tmp_path)
    kept = PeftTransformerDocumentEmbeddings(str(tmp_path), peft_config=LORA, dtype="auto")
    assert kept.base_dtype == torch.bfloat16
    assert PeftTransformerDocumentEmbeddings(str(tmp_path), peft_config=LORA).base_dtype == torch.float32


def test_linear_head_is_cast_after_loading_and_restored_by_training(base: Callable[[str], str], tmp_path: Path) -> None:
    """bf16 base, bf16 head after loading; the exact fp32 values come back with ``train()`` and are what files hold."""
    model = classifier(PeftTransformerDocumentEmbeddings(base("bert"), peft_config=LORA, dtype="bfloat16"))
    loaded = round_trip(model, tmp_path)
    assert model.decoder.weight.dtype == torch.float32
    assert loaded.decoder.weight.dtype == loaded.embeddings.output_dtype == torch.bfloat16
    assert torch.equal(loaded.state_dict()["decoder.weight"], model.decoder.weight)
    parameter = loaded.decoder.weight
    loaded.train()
    assert loaded.decoder.weight is parameter
    assert torch.equal(parameter, model.decoder.weight)
    assert loaded.embeddings.output_dtype == torch.float32
    assert predict(loaded) == predict(model)


@pytest.mark.parametrize("has_changed", [False, True])
def test_head_that_is_made_wide_again_has_its_exact_values(
    has_changed: bool, base: Callable[[str], str], tmp_path: Path
) -> None:
    """``model.float()``, also of tasks; what was changed since stays, and a move without another dtype changes none."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=LORA, dtype="bfloat16")
    model = MultitaskModel([classifier(embeddings), classifier(embeddings)], task_ids=["a", "b"])
    loaded = round_trip(model, tmp_path)
    head, exact = loaded.tasks["a"].decoder.weight, model.tasks["a"].decoder.weight
    loaded.to("cpu")
    assert head.dtype == torch.bfloat16
    if has_changed:
        with torch.no_grad():
            head.mul_(2)
    loaded.float()
    assert head.dtype == torch.float32
    assert torch.equal(head, exact.bfloat16().float() * 2 if has_changed else exact)
    assert torch.equal(loaded.state_dict()["a.decoder.weight"], head)
    assert torch.equal(loaded.tasks["b"].decoder.weight, model.tasks["b"].decoder.weight)
    loaded.train()
    assert torch.equal(loaded.tasks["a"].decoder.weight, head)


def test_whatever_was_narrowed_is_made_wide_again_with_its_exact_values(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """A head that was asked to be narrow, and an adapter that a shared base narrows."""
    options = {"peft_config": LORA, "dtype": "bfloat16", "head_dtype": "bfloat16"}
    model = classifier(PeftTransformerDocumentEmbeddings(base("bert"), **options))
    with torch.no_grad():
        [parameter.mul_(1.001) for name, parameter in model.named_parameters() if "lora_" in name]
    loaded = round_trip(model, tmp_path)
    loaded.embeddings.narrow_adapter_()
    expected = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n or "decoder" in n}
    found = dict(loaded.named_parameters())
    assert {found[name].dtype for name in expected} == {torch.bfloat16}
    loaded.float()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def test_head_changed_after_its_cast_keeps_the_change(base: Callable[[str], str], tmp_path: Path) -> None:
    """Values kept beside a cast head never overwrite newer ones."""
    model = classifier(PeftTransformerDocumentEmbeddings(base("bert"), peft_config=LORA, dtype="bfloat16"))
    loaded = round_trip(model, tmp_path)
    with torch.no_grad():
        loaded.decoder.weight.fill_(3.0)
    assert bool((loaded.state_dict()["decoder.weight"] == 3.0).all())
    loaded.train()
    assert loaded.decoder.weight.dtype == torch.float32
    assert bool((loaded.decoder.weight == 3.0).all())
    assert torch.equal(loaded.decoder.bias, model.decoder.bias)


@pytest.mark.parametrize("head_dtype", ["float32", "float16"])
def test_head_dtype_overrides_the_rule_and_is_recorded(
    head_dtype: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """What was asked for at construction holds for every later load."""
    embeddings = PeftTransformerDocumentEmbeddings(
        base("bert"), peft_config=LORA, dtype="bfloat16", head_dtype=head_dtype
    )
    model = classifier(embeddings)
    first = round_trip(model, tmp_path)
    for loaded in (first, round_trip(first, tmp_path)):
        assert loaded.decoder.weight.dtype == loaded.embeddings.output_dtype == parse_dtype(head_dtype)
        assert loaded.embeddings.base_dtype == torch.bfloat16
        assert len(predict(loaded)) == len(SENTENCES)
    if head_dtype == "float32":
        assert predict(first) == predict(model)


@pytest.mark.parametrize("use_crf", [False, True])
def test_head_of_a_tagger_is_not_cast_to_what_numpy_lacks(
    use_crf: bool, base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was, and predicted nothing after a load."""
    words = PeftTransformerWordEmbeddings(base("bert"), peft_config=LORA, head_dtype="bfloat16")
    model = tagger(words, use_crf=use_crf)
    loaded = round_trip(model, tmp_path)
    assert loaded.linear.weight.dtype == loaded.embeddings.output_dtype == torch.float32
    assert "head_dtype='bfloat16' is not used" in caplog.text
    assert torch.equal(loaded.linear.weight, model.linear.weight)
    predict(loaded)


def test_stack_of_two_bf16_adapters_casts_its_head(base: Callable[[str], str], tmp_path: Path) -> None:
    """Two adapters of one dtype feed a head of that dtype."""
    stack = StackedEmbeddings(
        [PeftTransformerWordEmbeddings(base("bert"), peft_config=LORA, dtype="bfloat16") for _ in range(2)]
    )
    loaded = round_trip(TokenClassifier(stack, label_dictionary=labels(), label_type="kind"), tmp_path)
    assert loaded.decoder.weight.dtype == torch.bfloat16
    loaded.predict([Sentence(text) for text in SENTENCES])


@pytest.mark.parametrize("other", ["float32", "stock"])
def test_stack_of_two_dtypes_keeps_its_head_in_fp32(other: str, base: Callable[[str], str], tmp_path: Path) -> None:
    """Concatenating bf16 with fp32 gives fp32, whether the other part has an adapter or is stock."""
    second = (
        TransformerWordEmbeddings(base("roberta"))
        if other == "stock"
        else PeftTransformerWordEmbeddings(base("bert"), peft_config=LORA)
    )
    stack = StackedEmbeddings([PeftTransformerWordEmbeddings(base("bert"), peft_config=LORA, dtype="bfloat16"), second])
    loaded = round_trip(TokenClassifier(stack, label_dictionary=labels(), label_type="kind"), tmp_path)
    assert loaded.decoder.weight.dtype == torch.float32
    loaded.predict([Sentence(text) for text in SENTENCES])


def test_embedding_of_several_heads_that_differ_keeps_all_in_fp32(base: Callable[[str], str], tmp_path: Path) -> None:
    """A CRF beside a linear head on one embedding: both get fp32 vectors."""
    shared = PeftTransformerEmbeddings(base("bert"), peft_config=LORA, dtype="bfloat16")
    tagger = SequenceTagger(shared, labels(), "kind", use_rnn=False, use_crf=True, reproject_embeddings=False)
    loaded = round_trip(MultitaskModel([tagger, classifier(shared)]), tmp_path)
    assert not has_castable_head(loaded)
    assert {task.embeddings.output_dtype for task in loaded.tasks.values()} == {torch.float32}
    assert {p.dtype for name, p in loaded.named_parameters() if ".embeddings." not in name} == {torch.float32}
    loaded.predict([Sentence(text) for text in SENTENCES])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_do_not_depend_on_padding(dtype: str, base: Callable[[str], str], tmp_path: Path) -> None:
    """A sentence in a padded batch gets the dtype, and to rounding the scores, that it gets alone."""
    model = classifier(PeftTransformerDocumentEmbeddings(base("bert"), peft_config=LORA, dtype=dtype))
    loaded = round_trip(model, tmp_path)
    together = predict(loaded)
    for text, scores in zip(SENTENCES, together, strict=True):
        alone = Sentence(text)
        loaded.predict(alone, return_probabilities_for_all_classes=True)
        assert [label.score for label in alone.get_labels()] == pytest.approx(scores, abs=2e-2)


def test_fp32_model_is_left_as_it_is(base: Callable[[str], str], tmp_path: Path) -> None:
    """With an fp32 base nothing is cast, and predictions are bit-equal."""
    model = classifier(PeftTransformerDocumentEmbeddings(base("bert"), peft_config=LORA))
    loaded = round_trip(model, tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert predict(loaded) == predict(model)


@pytest.mark.parametrize("head", ["castable", "tagger"])
def test_model_in_double_precision_is_converted_whole(head: str, base: Callable[[str], str]) -> None:
    """Only a narrower dtype is kept from a head that needs fp32; a wider one is what was asked for."""
    embeddings = PeftTransformerEmbeddings(base("bert"), peft_config=LORA)
    tagger = SequenceTagger(embeddings, labels(), "kind", use_rnn=False, use_crf=False, reproject_embeddings=False)
    model = classifier(embeddings) if head == "castable" else tagger
    model.double()
    assert {p.dtype for p in model.parameters()} == {embeddings.output_dtype} == {torch.float64}
    model.eval()
    model.predict([Sentence(text) for text in SENTENCES])


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Let torch make tensors in another dtype."""
    found = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(found)


@pytest.mark.parametrize(
    ("name", "default_dtype"),
    [
        ("text-classifier", torch.float64),
        ("sequence-tagger", torch.float64),
        ("sequence-tagger-rnn-crf", torch.float64),
        ("text-classifier", torch.bfloat16),  # Flair's taggers hand scores to NumPy, which has no bfloat16
    ],
    indirect=["default_dtype"],
)
def test_default_dtype_of_torch_is_that_of_base_and_head_as_in_flair(
    name: str, default_dtype: torch.dtype, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Predicting, training, saving, loading and predicting work in the dtypes that stock Flair has there."""
    entry, corpus = ZOO[name], ZOO[name].corpus()
    stock = entry.build(
        lambda: TransformerWordEmbeddings(base("bert")), lambda: TransformerDocumentEmbeddings(base("bert"))
    )
    factories = Factories(base("bert"), LORA)
    model = entry.build(factories.words, factories.documents)
    entry.predict(model, corpus)
    ModelTrainer(model, corpus).train(tmp_path, max_epochs=1, mini_batch_size=4, learning_rate=0.1)
    expected = entry.predict(model, corpus)
    loaded = type(model).load(tmp_path / "final-model.pt")
    assert largest_difference(entry.predict(loaded, corpus), expected) <= SCORE_TOLERANCE.get(default_dtype, 0.0)
    for each in (model, loaded):
        dtypes = {key: tensor.dtype for key, tensor in each.state_dict().items() if "lora" not in key}
        theirs = {key: tensor.dtype for key, tensor in stock.state_dict().items() if "embeddings" not in key}
        assert set(dtypes.values()) - {torch.int64} == {default_dtype}
        assert theirs.items() <= dtypes.items()


def test_average_of_a_loaded_model_moves_its_head_and_its_adapter(base: Callable[[str], str], tmp_path: Path) -> None:
    """As averages follow a training: by the state dicts of both, where one is trained and one is not."""
    flair_peft.save_pretrained(
        classifier(PeftTransformerDocumentEmbeddings(base("bert"), peft_config=LORA, dtype="bfloat16")), tmp_path
    )
    average, trained = (flair_peft.from_pretrained(tmp_path) for _ in range(2))
    trained.train()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora" in name or "decoder" in name:
                parameter.mul_(3)
    for kept, new in zip(average.state_dict().values(), trained.state_dict().values(), strict=True):
        kept.lerp_(new, 1.0)
    sentence, expected = Sentence("some words of a sentence"), Sentence("some words of a sentence")
    average.predict(sentence, return_probabilities_for_all_classes=True)
    trained.eval().predict(expected, return_probabilities_for_all_classes=True)
    found = [label.score for label in sentence.labels]
    assert found == pytest.approx([label.score for label in expected.labels], abs=0.02)
    for kept, new in zip(average.state_dict().values(), trained.state_dict().values(), strict=True):
        assert torch.equal(kept, new)


def test_gradients_of_a_prediction_do_not_stop_a_training(base: Callable[[str], str], tmp_path: Path) -> None:
    """In eval mode a cast head has gradients in half precision; training takes it back to fp32."""
    flair_peft.save_pretrained(
        classifier(PeftTransformerDocumentEmbeddings(base("bert"), peft_config=LORA, dtype="bfloat16")), tmp_path
    )
    model = flair_peft.from_pretrained(tmp_path)
    label = model.label_dictionary.get_items()[0]
    sentences = [Sentence("some words").add_label(model.label_type, label)]
    model.forward_loss(sentences)[0].backward()
    model.train()
    model.forward_loss(sentences)[0].backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.AdamW(parameters).step()
    assert {p.grad.dtype for p in parameters if p.grad is not None} == {torch.float32}


def _new_decoder(model: TextClassifier) -> TextClassifier:
    model.decoder = torch.nn.Linear(model.embeddings.embedding_length, 3)
    return model


def _new_head(model: TextClassifier) -> TextClassifier:
    return classifier(model.embeddings)


def _other_head_trained(model: TextClassifier) -> TextClassifier:
    classifier(model.embeddings).train()
    return model.eval()


@pytest.mark.parametrize("change", [_new_decoder, _new_head, _other_head_trained], ids=lambda change: change.__name__)
def test_head_of_another_dtype_is_named_when_it_predicts(
    change: Callable[[TextClassifier], TextClassifier], base: Callable[[str], str], tmp_path: Path
) -> None:
    """What was put on loaded embeddings in half precision, or beside them, is not what they were aligned to."""
    flair_peft.save_pretrained(
        classifier(PeftTransformerDocumentEmbeddings(base("bert"), peft_config=LORA, dtype="bfloat16")), tmp_path
    )
    changed = change(flair_peft.from_pretrained(tmp_path)).eval()
    with pytest.raises(DtypeMismatchError, match="of the head computes in"):
        changed.predict(Sentence("some words"))
