"""Every trainable model class of Flair, built on embeddings that the test supplies.

``ZOO`` maps a name to an ``Entry``. A test builds, trains, saves, loads and compares without knowing the class::

    entry = ZOO["sequence-tagger-crf"]
    model = entry.build(make_word_embeddings, make_document_embeddings)
    corpus = entry.corpus()
    entry.train(model, corpus, directory)
    before = entry.predict(model, corpus)

All corpora are made of the same few sentences, which carry every annotation layer at once. Left out are what no trainer
trains or what has no embeddings (EntityMentionLinker, RegexpTagger, LanguageModel, ClusteringModel) and mere aliases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from flair.data import Corpus, DataPair, DataPoint, DataTriple, Dictionary, MultiCorpus, Relation, Sentence, Span, Token
from flair.datasets import FlairDatapointDataset
from flair.embeddings import (
    DocumentEmbeddings,
    DocumentPoolEmbeddings,
    DocumentRNNEmbeddings,
    StackedEmbeddings,
    TokenEmbeddings,
)
from flair.models import (
    Lemmatizer,
    MultitaskModel,
    PrefixedSequenceTagger,
    RelationClassifier,
    RelationExtractor,
    SequenceTagger,
    SpanClassifier,
    TARSClassifier,
    TARSTagger,
    TextClassifier,
    TextPairClassifier,
    TextPairRegressor,
    TextRegressor,
    TextTripleClassifier,
    TokenClassifier,
)
from flair.models.entity_linker_model import CandidateGenerator
from flair.models.prefixed_tagger import EntityTypeTaskPromptAugmentationStrategy
from flair.models.relation_classifier_model import EntityMarker, TypedEntityMarker
from flair.nn import DeepNCMDecoder, LabelVerbalizerDecoder, Model, PrototypicalDecoder
from flair.trainers import ModelTrainer
from flair.trainers.plugins import TrainerPlugin
from flair.trainers.plugins.functional.deepncm_trainer_plugin import DeepNCMPlugin

BATCH = 2
PREDICTED = "predicted"


class MakeWordEmbeddings(Protocol):
    """Returns new token embeddings; keyword arguments are those of Flair's TransformerWordEmbeddings."""

    def __call__(self, **kwargs: Any) -> TokenEmbeddings: ...


class MakeDocumentEmbeddings(Protocol):
    """Returns new document embeddings; keyword arguments are those of Flair's TransformerDocumentEmbeddings."""

    def __call__(self, **kwargs: Any) -> DocumentEmbeddings: ...


Build = Callable[[MakeWordEmbeddings, MakeDocumentEmbeddings], Model]
Predictions = list[Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One Flair model class in one configuration.

    Attributes:
        model_class: what ``build`` returns, and whose ``load`` reads it again.
        build: embeddings factories → model.
        corpus: () → corpus of new data points.
        predict_into: labels the data points and returns a plain representation of the labels.
        level: what the model asks of its embeddings.
        prefixes: state-dict prefixes of the embeddings; several where one object is registered more than once.
        transform_corpus: model, corpus → what the trainer takes.
        plugins: () → plugins that training needs.
        loads_in_stock: stock Flair can load what it saved; otherwise the reason why not.
    """

    model_class: type[Model]
    build: Build
    corpus: Callable[[], Corpus]
    predict_into: Callable[[Any, list[Any]], Predictions]
    level: Literal["word", "document", "both"]
    prefixes: tuple[str, ...] = ("embeddings.",)
    transform_corpus: Callable[[Any, Corpus], Corpus] = lambda _, corpus: corpus
    plugins: Callable[[], list[TrainerPlugin]] = list
    loads_in_stock: Literal[True] | str = True

    def predict(self, model: Model, corpus: Corpus) -> Predictions:
        """Return the labels and scores that ``model`` gives to new copies of the test data points, in their order."""
        points = [copy_point(point) for point in _points(corpus.test)]
        model.eval()
        return self.predict_into(model, points)

    def loss(self, model: Model, corpus: Corpus) -> float:
        """Return the loss on new copies of the test data points, in evaluation mode and without gradient."""
        points = [copy_point(point) for point in _points(self.transform_corpus(model, corpus).test)]
        model.eval()
        with torch.no_grad():
            return float(model.forward_loss(points)[0])

    def train(self, model: Model, corpus: Corpus, directory: Path, **options: Any) -> dict[str, Any]:
        """Fine-tune ``model`` for an epoch, or as ``options`` say, and return what Flair's trainer returns."""
        settings: dict[str, Any] = {"max_epochs": 1, "mini_batch_size": BATCH, "learning_rate": 4e-3, **options}
        plugins = [*self.plugins(), *settings.pop("plugins", [])]
        trainer = ModelTrainer(model, self.transform_corpus(model, corpus))
        return trainer.fine_tune(directory, plugins=plugins, **settings)


class Mention(NamedTuple):
    """An entity in a sentence: tokens ``start`` to ``stop`` (exclusive), its type and its page."""

    start: int
    stop: int
    entity_type: str
    page: str


class Example(NamedTuple):
    """A sentence and all its annotations; relations are (index of head mention, index of tail mention, label)."""

    text: str
    sentiment: str
    topics: tuple[str, ...]
    rating: float
    mentions: tuple[Mention, ...] = ()
    relations: tuple[tuple[int, int, str], ...] = ()


_TRAIN = (
    Example(
        "George Washington went to Washington .",
        "neutral",
        ("politics", "travel"),
        0.5,
        (Mention(0, 2, "PER", "George_Washington"), Mention(4, 5, "LOC", "Washington_(city)")),
        ((0, 1, "visited"),),
    ),
    Example(
        "Angela Merkel lives in Berlin , Germany .",
        "neutral",
        ("politics",),
        0.6,
        (Mention(0, 2, "PER", "Angela_Merkel"), Mention(4, 5, "LOC", "Berlin"), Mention(6, 7, "LOC", "Germany")),
        ((0, 1, "lives_in"), (1, 2, "located_in")),
    ),
    Example(
        "Steve Jobs founded Apple in California .",
        "positive",
        ("business",),
        0.7,
        (Mention(0, 2, "PER", "Steve_Jobs"), Mention(3, 4, "ORG", "Apple"), Mention(5, 6, "LOC", "California")),
        ((0, 1, "founded"), (1, 2, "located_in")),
    ),
    Example("I love this wonderful movie !", "positive", ("film",), 0.9),
    Example("This film was terrible .", "negative", ("film",), 0.1),
    Example(
        "She visited Berlin and loved it .",
        "positive",
        ("travel",),
        0.8,
        (Mention(2, 3, "LOC", "Berlin"),),
    ),
    Example("The car broke down in Berlin .", "negative", ("travel",), 0.2, (Mention(5, 6, "LOC", "Berlin"),)),
    Example(
        "Apple sold cars in Germany .",
        "neutral",
        ("business",),
        0.4,
        (Mention(0, 1, "ORG", "Apple"), Mention(4, 5, "LOC", "Germany")),
        ((0, 1, "located_in"),),
    ),
)
_DEV = (
    Example(
        "Steve Jobs visited Berlin .",
        "neutral",
        ("travel", "business"),
        0.5,
        (Mention(0, 2, "PER", "Steve_Jobs"), Mention(3, 4, "LOC", "Berlin")),
        ((0, 1, "visited"),),
    ),
    Example("A great film !", "positive", ("film",), 1.0),
    Example(
        "I hated the city of Washington .", "negative", ("travel",), 0.0, (Mention(5, 6, "LOC", "Washington_(city)"),)
    ),
)
_TEST = (
    Example(
        "Angela Merkel went to California and met Steve Jobs of Apple .",
        "positive",
        ("politics", "business"),
        0.7,
        (
            Mention(0, 2, "PER", "Angela_Merkel"),
            Mention(4, 5, "LOC", "California"),
            Mention(7, 9, "PER", "Steve_Jobs"),
            Mention(10, 11, "ORG", "Apple"),
        ),
        ((0, 1, "visited"), (2, 3, "founded")),
    ),
    Example("Terrible !", "negative", ("film",), 0.1),
    Example(
        "Berlin is in Germany .",
        "neutral",
        ("politics",),
        0.4,
        (Mention(0, 1, "LOC", "Berlin"), Mention(3, 4, "LOC", "Germany")),
        ((0, 1, "located_in"),),
    ),
)

_PAIRS: dict[str, tuple[tuple[str, str, str, float], ...]] = {
    "train": (
        ("A man plays the guitar .", "Someone makes music .", "entailment", 0.9),
        ("A dog runs in the park .", "The animal is asleep .", "contradiction", 0.1),
        ("She bought a car .", "She bought a red car .", "neutral", 0.6),
        ("It rains .", "The street is wet .", "entailment", 0.7),
    ),
    "dev": (
        ("He sold the house .", "He owns it .", "contradiction", 0.2),
        ("I read .", "I read books .", "neutral", 0.7),
    ),
    "test": (
        ("The fox jumps over the lazy dog .", "An animal jumps .", "entailment", 0.8),
        ("No .", "Yes .", "contradiction", 0.0),
        ("The film is long .", "The film is good .", "neutral", 0.5),
    ),
}


def sentence_corpus() -> Corpus[Sentence]:
    """Return sentences with the layers sentiment, topic, rating, ner, nel, relation, pos and lemma."""
    return _corpus(*([_sentence(example) for example in split] for split in (_TRAIN, _DEV, _TEST)))


def pair_corpus() -> Corpus[DataPair]:
    """Return pairs of sentences with the layers entailment and similarity."""
    return _corpus(*([_pair(*row) for row in _PAIRS[split]] for split in ("train", "dev", "test")))


def triple_corpus() -> Corpus[DataTriple]:
    """Return triples of sentences with the layer entailment."""
    return _corpus(*([_triple(*row) for row in _PAIRS[split]] for split in ("train", "dev", "test")))


def multitask_corpus() -> Corpus[Sentence]:
    """Return the sentences twice, once for the task "first" and once for the task "second"."""
    return MultiCorpus([sentence_corpus(), sentence_corpus()], task_ids=["first", "second"])


def _corpus(train: list[Any], dev: list[Any], test: list[Any]) -> Corpus:
    splits = {"train": train, "dev": dev, "test": test}
    return Corpus(
        **{split: FlairDatapointDataset(points) for split, points in splits.items()}, sample_missing_splits=False
    )


def _sentence(example: Example) -> Sentence:
    sentence = Sentence(example.text.split(), use_tokenizer=False)
    sentence.add_label("sentiment", example.sentiment)
    for topic in example.topics:
        sentence.add_label("topic", topic)
    sentence.add_label("rating", str(example.rating))
    for token in sentence:
        token.add_label("pos", _part_of_speech(token.text))
        token.add_label("lemma", token.text.lower().rstrip("s"))
    spans = [sentence[mention.start : mention.stop] for mention in example.mentions]
    for span, mention in zip(spans, example.mentions, strict=True):
        span.add_label("ner", mention.entity_type)
        span.add_label("nel", mention.page)
    for head, tail, label in example.relations:
        Relation(spans[head], spans[tail]).add_label("relation", label)
    return sentence


def _part_of_speech(word: str) -> str:
    if not word[0].isalnum():
        return "PUNCT"
    return "NAME" if word[0].isupper() else "WORD"


def _pair(first: str, second: str, entailment: str, similarity: float) -> DataPair:
    pair = DataPair(*(Sentence(text.split(), use_tokenizer=False) for text in (first, second)))
    return pair.add_label("entailment", entailment).add_label("similarity", str(similarity))


def _triple(first: str, second: str, entailment: str, _: float) -> DataTriple:
    texts = (first, second, "Is that so ?")
    return DataTriple(*(Sentence(text.split(), use_tokenizer=False) for text in texts)).add_label(
        "entailment", entailment
    )


def _points(dataset: Any) -> list[Any]:
    return [dataset[index] for index in range(len(dataset))]


def copy_point(point: Any) -> Any:
    """Return a data point with the same text, labels and metadata, but without embeddings or neighbours."""
    if isinstance(point, DataPair):
        copy: DataPoint = DataPair(copy_point(point.first), copy_point(point.second))
    elif isinstance(point, DataTriple):
        copy = DataTriple(copy_point(point.first), copy_point(point.second), copy_point(point.third))
    else:
        copy = _copy_sentence(point)
    for label in point.labels:
        _counterpart(label.data_point, copy).add_label(_layer(point, label), label.value, label.score)
    return copy


def _copy_sentence(sentence: Sentence) -> Sentence:
    # Subclasses mark prepared sentences: EncodedSentence, PrefixedSentence.
    copy = type(sentence)([token.text for token in sentence], use_tokenizer=False)
    copy._metadata.update(sentence._metadata)
    for token, original in zip(copy, sentence, strict=True):
        token._metadata.update(original._metadata)
    return copy


def _counterpart(part: DataPoint, copy: Any) -> DataPoint:
    if isinstance(part, Token):
        return copy[part.idx - 1]
    if isinstance(part, Span):
        return copy[part[0].idx - 1 : part[-1].idx]
    if isinstance(part, Relation):
        return Relation(_counterpart(part.first, copy), _counterpart(part.second, copy))
    return copy


def _layer(point: DataPoint, label: Any) -> str:
    return next(name for name, labels in point.annotation_layers.items() if any(label is other for other in labels))


def _labels(point: DataPoint, layer: str) -> list[tuple[str, str, float]]:
    return [(label.unlabeled_identifier, label.value, label.score) for label in point.get_labels(layer)]


def _classify(model: Any, points: list[Any]) -> Predictions:
    """Return every label that Flair's default classifiers consider, with its probability."""
    model.predict(points, mini_batch_size=BATCH, label_name=PREDICTED, return_probabilities_for_all_classes=True)
    return [_labels(point, PREDICTED) for point in points]


def _classify_best(model: Any, points: list[Any]) -> Predictions:
    model.predict(points, mini_batch_size=BATCH, label_name=PREDICTED)
    return [_labels(point, PREDICTED) for point in points]


def _classify_spans(model: TokenClassifier, points: list[Sentence]) -> Predictions:
    """Return the predicted spans, whose scores are always 1, and the scores of each token."""
    spans = _classify_best(model, points)
    with torch.no_grad():
        tokens = model._get_data_points_for_batch(points)
        scores = model.decoder(model._encode_data_points(points, tokens))
    return [spans, scores.tolist()]


def _tag(model: Any, points: list[Sentence]) -> Predictions:
    """Return the predicted labels, and for each token the probability of every tag."""
    model.predict(points, mini_batch_size=BATCH, label_name=PREDICTED, return_probabilities_for_all_classes=True)
    return [(_labels(point, PREDICTED), [_distribution(token) for token in point]) for point in points]


def _distribution(token: Token) -> list[tuple[str, float]]:
    # A numpy scalar without a CRF, a float with one.
    return [(label.value, float(label.score)) for label in token.get_tags_proba_dist(PREDICTED)]


def _tag_prefixed(model: PrefixedSequenceTagger, points: list[Sentence]) -> Predictions:
    """Return the labels on the sentences, and the tags of the sentences with their prompts."""
    spans = _classify_best(model, points)
    return [spans, _tag(model, model.augment_sentences(points, model.tag_type))]


def _classify_by_name(model: TARSClassifier, points: list[Sentence]) -> Predictions:
    """Return every label with its score."""
    model.predict(points, mini_batch_size=BATCH, label_name=PREDICTED, label_threshold=0.0)
    return [_labels(point, PREDICTED) for point in points]


def _tag_by_name(model: TARSTagger, points: list[Sentence]) -> Predictions:
    """Return the labels on the sentences, and what the tagger inside says of each sentence with each label."""
    spans = _classify_best(model, points)
    return [spans, _tag(model.tars_model, model._get_tars_formatted_sentences(points))]


def _classify_relations(model: RelationClassifier, points: list[Sentence]) -> Predictions:
    """Return every relation with its probability; Flair adds them to relations, not to sentences."""
    model.predict(points, mini_batch_size=BATCH, label_name=PREDICTED, return_probabilities_for_all_classes=True)
    return [sorted(_labels(point, PREDICTED)) for point in points]


def _regress(model: Any, points: list[Any]) -> Predictions:
    model.predict(points, mini_batch_size=BATCH, label_name=PREDICTED)
    return [float(point.get_label(PREDICTED).value) for point in points]


def _lemmatise(model: Lemmatizer, points: list[Sentence]) -> Predictions:
    """Return the lemmas, and the scores of each character of the gold lemmas: an untrained model's lemmas are noise."""
    model.predict(points, mini_batch_size=BATCH, label_name=PREDICTED)
    lemmas = [[token.get_label(PREDICTED).value for token in point] for point in points]
    with torch.no_grad():
        scores, _ = model.forward_pass(points)
    return [lemmas, scores.tolist()]


def _predict_tasks(model: MultitaskModel, points: list[Sentence]) -> Predictions:
    """Return what each task predicts, on copies of its own: a task removes what another wrote into the same layer."""
    predictors = {SequenceTagger: _tag, TextClassifier: _classify, TokenClassifier: _classify}
    return [predictors[type(task)](task, [copy_point(point) for point in points]) for task in model.tasks.values()]


def _dictionary(corpus: Callable[[], Corpus], layer: str, *, add_unk: bool = False) -> Dictionary:
    return corpus().make_label_dictionary(layer, add_unk=add_unk)


def _text_classifier(
    embeddings: DocumentEmbeddings, *, decoder: Callable[[Dictionary, int], torch.nn.Module] | None = None
) -> TextClassifier:
    labels = _dictionary(sentence_corpus, "sentiment")
    options = {} if decoder is None else {"decoder": decoder(labels, embeddings.embedding_length)}
    return TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels, **options)


def _sequence_tagger(embeddings: TokenEmbeddings, layer: str = "ner", **options: Any) -> SequenceTagger:
    settings = {"use_rnn": False, "use_crf": False, "reproject_embeddings": False, "hidden_size": 16, **options}
    labels = _dictionary(sentence_corpus, layer)
    return SequenceTagger(embeddings, tag_dictionary=labels, tag_type=layer, **settings)


def _token_classifier(embeddings: TokenEmbeddings, layer: str = "pos") -> TokenClassifier:
    return TokenClassifier(embeddings, label_dictionary=_dictionary(sentence_corpus, layer), label_type=layer)


def _span_classifier(embeddings: TokenEmbeddings, candidates: CandidateGenerator | None = None) -> SpanClassifier:
    labels = _dictionary(sentence_corpus, "nel", add_unk=True)
    return SpanClassifier(embeddings, labels, label_type="nel", span_label_type="ner", candidates=candidates)


def _candidates() -> CandidateGenerator:
    mentions = (mention for example in (*_TRAIN, *_DEV, *_TEST) for mention in example.mentions)
    pages = {mention.page.replace("_", " "): [mention.page, "Berlin"] for mention in mentions}
    return CandidateGenerator(pages)


def _relation_classifier(embeddings: DocumentEmbeddings, strategy: Any) -> RelationClassifier:
    labels = _dictionary(sentence_corpus, "relation")
    return RelationClassifier(
        embeddings, labels, label_type="relation", entity_label_types="ner", encoding_strategy=strategy
    )


def _relation_extractor(embeddings: TokenEmbeddings) -> RelationExtractor:
    return RelationExtractor(
        embeddings,
        label_type="relation",
        entity_label_type="ner",
        entity_pair_filters=[("PER", "LOC"), ("PER", "ORG"), ("ORG", "LOC"), ("LOC", "LOC")],
        label_dictionary=_dictionary(sentence_corpus, "relation", add_unk=True),
    )


def _prefixed_tagger(embeddings: TokenEmbeddings) -> PrefixedSequenceTagger:
    return PrefixedSequenceTagger(
        embeddings,
        tag_dictionary=_dictionary(sentence_corpus, "ner"),
        tag_type="ner",
        use_rnn=False,
        use_crf=False,
        reproject_embeddings=False,
        augmentation_strategy=EntityTypeTaskPromptAugmentationStrategy(["persons", "cities"]),
    )


def _lemmatizer(embeddings: TokenEmbeddings) -> Lemmatizer:
    characters = Dictionary(add_unk=True)
    for character in "abcdefghijklmnopqrstuvwxyz.,!?":
        characters.add_item(character)
    return Lemmatizer(embeddings, char_dict=characters, rnn_input_size=8, rnn_hidden_size=16, rnn_layers=2)


def _multitask_model(first: Model, second: Model) -> MultitaskModel:
    return MultitaskModel([first, second], task_ids=["first", "second"], loss_factors=[1.0, 0.5])


def _tag_two_layers(embeddings: TokenEmbeddings) -> MultitaskModel:
    return _multitask_model(_sequence_tagger(embeddings), _token_classifier(embeddings))


def _tag_and_classify(embeddings: Any) -> MultitaskModel:
    return _multitask_model(_sequence_tagger(embeddings), _text_classifier(embeddings))


def _prototypes(labels: Dictionary, size: int) -> PrototypicalDecoder:
    return PrototypicalDecoder(
        num_prototypes=len(labels), embeddings_size=size, prototype_size=8, normal_distributed_initial_prototypes=True
    )


_SENTENCES: dict[str, Any] = {"corpus": sentence_corpus}
_WORD: dict[str, Any] = {**_SENTENCES, "level": "word"}
_TAGGER: dict[str, Any] = {**_WORD, "model_class": SequenceTagger, "predict_into": _tag}
_DOCUMENT: dict[str, Any] = {**_SENTENCES, "level": "document"}
_CLASSIFIER: dict[str, Any] = {**_DOCUMENT, "model_class": TextClassifier, "predict_into": _classify}
_RELATIONS: dict[str, Any] = {
    **_DOCUMENT,
    "model_class": RelationClassifier,
    "predict_into": _classify_relations,
    "transform_corpus": RelationClassifier.transform_corpus,
}
_TARS: dict[str, Any] = {"prefixes": ("tars_model.embeddings.",)}

ZOO: dict[str, Entry] = {
    "text-classifier": Entry(**_CLASSIFIER, build=lambda _, document: _text_classifier(document())),
    "text-classifier-multi-label": Entry(
        **_CLASSIFIER,
        build=lambda _, document: TextClassifier(
            document(),
            label_type="topic",
            label_dictionary=_dictionary(sentence_corpus, "topic"),
            multi_label=True,
            multi_label_threshold=0.3,
        ),
    ),
    "text-classifier-deep-ncm": Entry(
        **_CLASSIFIER,
        build=lambda _, document: _text_classifier(
            document(), decoder=lambda labels, size: DeepNCMDecoder(labels, size, encoding_dim=8)
        ),
        plugins=lambda: [DeepNCMPlugin()],
    ),
    "text-classifier-prototypes": Entry(
        **_CLASSIFIER, build=lambda _, document: _text_classifier(document(), decoder=_prototypes)
    ),
    "text-classifier-label-verbalizer": Entry(
        **_CLASSIFIER,
        build=lambda _, document: _text_classifier(
            document(), decoder=lambda labels, _: LabelVerbalizerDecoder(document(), labels)
        ),
        prefixes=("embeddings.", "decoder.label_embedding."),
        loads_in_stock="the label encoder is pickled with its decoder, and stock embeddings cannot be unpickled",
    ),
    "text-classifier-pool": Entry(
        **_CLASSIFIER,
        build=lambda word, _: _text_classifier(DocumentPoolEmbeddings([word()], fine_tune_mode="linear")),
        prefixes=("embeddings.embeddings.list_embedding_0.",),
    ),
    "text-classifier-rnn": Entry(
        **_CLASSIFIER,
        build=lambda word, _: _text_classifier(DocumentRNNEmbeddings([word()], hidden_size=16, dropout=0.0)),
        prefixes=("embeddings.embeddings.list_embedding_0.",),
    ),
    "sequence-tagger": Entry(**_TAGGER, build=lambda word, _: _sequence_tagger(word())),
    "sequence-tagger-reproject": Entry(
        **_TAGGER, build=lambda word, _: _sequence_tagger(word(), reproject_embeddings=True)
    ),
    "sequence-tagger-crf": Entry(**_TAGGER, build=lambda word, _: _sequence_tagger(word(), use_crf=True)),
    "sequence-tagger-rnn": Entry(**_TAGGER, build=lambda word, _: _sequence_tagger(word(), use_rnn=True)),
    "sequence-tagger-rnn-crf": Entry(
        **_TAGGER,
        build=lambda word, _: _sequence_tagger(word(), use_rnn=True, use_crf=True, reproject_embeddings=True),
    ),
    "sequence-tagger-tokens": Entry(**_TAGGER, build=lambda word, _: _sequence_tagger(word(), "pos")),
    "sequence-tagger-stacked": Entry(
        **_TAGGER,
        build=lambda word, _: _sequence_tagger(StackedEmbeddings([word(), word(layers="-2", subtoken_pooling="mean")])),
        prefixes=("embeddings.list_embedding_0.", "embeddings.list_embedding_1."),
    ),
    "token-classifier": Entry(
        **_WORD, model_class=TokenClassifier, predict_into=_classify, build=lambda word, _: _token_classifier(word())
    ),
    "token-classifier-spans": Entry(
        **_WORD,
        model_class=TokenClassifier,
        predict_into=_classify_spans,
        build=lambda word, _: _token_classifier(word(), "ner"),
    ),
    "span-classifier": Entry(
        **_WORD,
        model_class=SpanClassifier,
        predict_into=_classify,
        build=lambda word, _: _span_classifier(word()),
    ),
    "span-classifier-candidates": Entry(
        **_WORD,
        model_class=SpanClassifier,
        predict_into=_classify,
        build=lambda word, _: _span_classifier(word(), _candidates()),
    ),
    "relation-classifier": Entry(
        **_RELATIONS, build=lambda _, document: _relation_classifier(document(), TypedEntityMarker())
    ),
    "relation-classifier-special-tokens": Entry(
        **_RELATIONS,
        build=lambda _, document: _relation_classifier(document(), EntityMarker(add_special_tokens=True)),
    ),
    "relation-extractor": Entry(
        **_WORD,
        model_class=RelationExtractor,
        predict_into=_classify,
        build=lambda word, _: _relation_extractor(word()),
    ),
    "text-pair-classifier": Entry(
        **{**_DOCUMENT, "corpus": pair_corpus},
        model_class=TextPairClassifier,
        predict_into=_classify,
        build=lambda _, document: TextPairClassifier(
            document(), "entailment", label_dictionary=_dictionary(pair_corpus, "entailment")
        ),
    ),
    "text-pair-classifier-separate": Entry(
        **{**_DOCUMENT, "corpus": pair_corpus},
        model_class=TextPairClassifier,
        predict_into=_classify,
        build=lambda _, document: TextPairClassifier(
            document(), "entailment", embed_separately=True, label_dictionary=_dictionary(pair_corpus, "entailment")
        ),
    ),
    "text-pair-regressor": Entry(
        **{**_DOCUMENT, "corpus": pair_corpus},
        model_class=TextPairRegressor,
        predict_into=_regress,
        build=lambda _, document: TextPairRegressor(document(), "similarity"),
    ),
    "text-triple-classifier": Entry(
        **{**_DOCUMENT, "corpus": triple_corpus},
        model_class=TextTripleClassifier,
        predict_into=_classify,
        build=lambda _, document: TextTripleClassifier(
            document(), "entailment", label_dictionary=_dictionary(triple_corpus, "entailment")
        ),
    ),
    "text-regressor": Entry(
        **_DOCUMENT,
        model_class=TextRegressor,
        predict_into=_regress,
        build=lambda _, document: TextRegressor(document(), label_name="rating"),
        prefixes=("document_embeddings.",),
    ),
    "tars-classifier": Entry(
        **{**_DOCUMENT, **_TARS},
        model_class=TARSClassifier,
        predict_into=_classify_by_name,
        build=lambda _, document: TARSClassifier(
            "feelings", _dictionary(sentence_corpus, "sentiment"), "sentiment", document()
        ),
    ),
    "tars-tagger": Entry(
        **{**_WORD, **_TARS},
        model_class=TARSTagger,
        predict_into=_tag_by_name,
        build=lambda word, _: TARSTagger("entities", _dictionary(sentence_corpus, "ner"), "ner", word()),
    ),
    "prefixed-sequence-tagger": Entry(
        **_WORD,
        model_class=PrefixedSequenceTagger,
        predict_into=_tag_prefixed,
        build=lambda word, _: _prefixed_tagger(word()),
    ),
    "lemmatizer": Entry(
        **_WORD,
        model_class=Lemmatizer,
        predict_into=_lemmatise,
        build=lambda word, _: _lemmatizer(word()),
        prefixes=("encoder_embeddings.",),
    ),
    "multitask": Entry(
        model_class=MultitaskModel,
        build=lambda word, _: _tag_two_layers(word()),
        corpus=multitask_corpus,
        predict_into=_predict_tasks,
        level="word",
        prefixes=("first.embeddings.", "second.embeddings."),
    ),
    "multitask-word-and-document": Entry(
        model_class=MultitaskModel,
        build=lambda word, _: _tag_and_classify(word(is_document_embedding=True)),
        corpus=multitask_corpus,
        predict_into=_predict_tasks,
        level="both",
        prefixes=("first.embeddings.", "second.embeddings."),
    ),
}
