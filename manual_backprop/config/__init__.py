"""Configuration: the schema and its rules, composition by Hydra, validation, the command line and its help.

`schema` holds the dataclasses of a run, `network` the one of a network (`CustomTransformerConfig`), `rules` the allowed
values of each kind. `validation` turns a mapping into a `RunConfig` or a list of violations, `composition` calls Hydra.
Not here: the objects that a config describes; `training` builds them.
Needs no torch.
May import: common.
"""
