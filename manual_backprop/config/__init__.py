"""Configuration: the schema and its rules, composition by Hydra, validation, the command line and its help.

`schema` holds the dataclasses of a run, `network` that of a network (`CustomTransformerConfig`), `rules` a class for
each kind of value. `validation` turns a mapping into a `RunConfig` or a list of violations, `composition` calls Hydra.
Not here: the objects that a config describes; `training` builds them.
Does not need torch.
May import: common.
"""
