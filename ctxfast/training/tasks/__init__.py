# SPDX-License-Identifier: Apache-2.0
"""Tasks that a model is fine-tuned for: classes of texts and pairs, tags of words, answers in a text,
coreference.

A predictor (``BertTagger``, ``FeatureTagger``, ``BertClassifier``, ...) is a model and what it needs to read examples,
to predict and to be stored; ``FineTune`` hands it to the training loop. ``build.build`` makes
one from a pretrained model, ``build.load`` opens a stored one.
"""
