"""The embeddings class and its Word and Document forms: parameters, weights, probe, the head's dtype, batches.

May import ``codec``, ``foreign`` and what lies below them.
"""

import flair  # noqa: F401, first: when it is imported, the hook imports what is here

from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.embeddings.word_and_document import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings

# Files and pickles name the classes so, and go on doing it.
for _class in (PeftTransformerDocumentEmbeddings, PeftTransformerEmbeddings, PeftTransformerWordEmbeddings):
    _class.__module__ = __name__

__all__ = ["PeftTransformerDocumentEmbeddings", "PeftTransformerEmbeddings", "PeftTransformerWordEmbeddings"]
