"""The trackers, a file each. A descendant's file holds what it adds to its ancestor:

siamfc -> siamfc_ca; stark -> stark_variants, stark_ca; sbt; ostrack -> procontext;
stmtrack -> dastm; mixvit -> ustam. `base` is what all have in common, `references` need no
training, `template` is there to be copied. Names and weight files: `trackkit.weights`.
"""
