"""What the pickle of a model with adapters may name: modules, records, functions, constants.

It is what Flair 0.14 to 0.15.1 writes of its models on transformer embeddings, and no more. Whoever writes a pickle
chooses what is called with which arguments, so each of these must be harmless with any.
"""

from __future__ import annotations

BUILTINS = ("__builtin__", "builtins")  # as protocol 2 calls it, and as protocol 4 does
_ENCODINGS = ("EntityMask", "EntityMarker", "EntityMarkerPunct")
_LAYERS = (
    *(f"activation.{name}" for name in ("GELU", "ReLU", "Tanh")),
    *(f"container.{name}" for name in ("ModuleList", "Sequential")),
    *("dropout.Dropout", "linear.Identity", "linear.Linear", "normalization.LayerNorm"),
)
_DISTANCES = (
    *(f"cosine.{name}" for name in ("CosineDistance", "LogitCosineDistance", "NegativeScaledDotProduct")),
    *("euclidean.EuclideanDistance", "hyperbolic.HyperbolicDistance"),
)

EMBEDDINGS_STATE = "flair_peft_params"
"""Under which the state of this package's embeddings, pickled with a module around them, holds what files hold."""

# Modules are pickled whole where a classifier got a decoder of its own; the label verbalizer's has embeddings inside.
# They are rebuilt without a constructor: ``__setstate__`` of torch's modules sets attributes, that of our embeddings
# takes the values that any file holds of them.
MODULES = frozenset(
    {
        *(f"torch.nn.modules.{name}" for name in _LAYERS),
        *(f"flair.nn.distance.{name}" for name in _DISTANCES),
        *(f"flair.nn.decoder.{name}Decoder" for name in ("DeepNCM", "LabelVerbalizer", "Prototypical")),
        *(f"flair_peft.embeddings.PeftTransformer{kind}Embeddings" for kind in ("", "Word", "Document")),
    }
)

# Rebuilt without a constructor too. These hold labels, characters, words and numbers; only Flair's Dictionary has a
# ``__setstate__``, which sets attributes.
RECORDS = frozenset(
    {
        "_io.BytesIO",  # tokenizer files
        "flair.data.Dictionary",
        "flair.data.Sentence",  # verbalised labels
        "flair.data.Token",
        "flair.models.entity_linker_model.CandidateGenerator",
        "flair.models.prefixed_tagger.EntityTypeTaskPromptAugmentationStrategy",
        *(f"flair.models.relation_classifier_model.{typed}{name}" for typed in ("", "Typed") for name in _ENCODINGS),
        "flair_peft.compat.FormatVersion",
        "torch.torch_version.TorchVersion",  # in the model card
    }
)

# Called. The first two make tensors of storages that torch has read from the same file, the others containers.
FUNCTIONS = frozenset(
    {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "collections.OrderedDict",
        *(f"{module}.{kind}" for module in BUILTINS for kind in ("set", "frozenset")),
        # What flair_peft writes in place of a pickled object: it checks plain values by the rules of its own format.
        "flair_peft.codec.restore_state",
    }
)

# Constants: they are named and nothing can be called. torch itself takes care of the storages, which only name a dtype.
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
CONSTANTS = frozenset({*(f"torch.{name}" for name in _DTYPES), *(f"torch.{name}Storage" for name in _STORAGES)})

# The model card holds what the trainer was given. No model needs it to predict, so it is not rebuilt: what was an
# object becomes the name of its class, which is how Flair itself stores classes there.
WITHHELD = ("torch.optim.", "flair.optim.", "flair.samplers.", "flair.trainers.")

# What copies tensors while it is rebuilt. In old-style files these have no content yet at that moment.
READ_AT_ONCE = {"flair_peft.codec.restore_state", *(name for name in MODULES if name.startswith("flair_peft."))}

# What becomes part of the live model, and with it the memory of its tensors. The weights of a base that a file holds do
# so too, on purpose: they stay in the file, which this package replaces and never writes to.
KEPT_ALIVE = MODULES
