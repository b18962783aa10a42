"""The data set: records, sizes, the plan of the whole run, and the packs it is trained on."""
