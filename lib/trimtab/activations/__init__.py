"""The activation cache: written once through the model (`activations.writing`), resumable, and from then on read
without model or text.

A cache is a folder of one split:

    shard-00000.safetensors ...   `layers.<site>` bf16 [rows, d_model]; `norms` fp32 [rows, sites];
                                  `token`, `document`, `position` int32 [rows] (position: index within the document)
    journal.json                  shards finished so far, while the cache is being written
    means.safetensors             `layers.<site>` fp32 [d_model], mean over kept rows
    manifest.json                 written last: identity, checksums, statistics. No manifest, no cache.

Excluded tokens. (1) The first position of each forward pass, where decoders park attention; it is the BOS where the
tokenizer has one. It is never stored. (2) At each site, rows whose norm exceeds OUTLIER_FACTOR times the site's median
norm; they are stored, counted, and skipped on reading. Both counts stand in the manifest.

Normalisation: readers serve (x - mean) * scale, with one mean and one scalar per site, so that a kept row has unit
mean square per dimension. Caches of other splits take threshold, mean and scale from the train cache.
"""

from trimtab.activations.reading import ActivationCache, SiteStatistics

__all__ = ["ActivationCache", "SiteStatistics"]
