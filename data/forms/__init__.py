"""The forms that data sets come in: one small module a form, each a pure function from a row to a `Conversation`."""
