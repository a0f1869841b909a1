"""The model card."""


def card(source, recipe, records, text_record):
    return "# card\n"
