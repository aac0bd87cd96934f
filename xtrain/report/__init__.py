"""From finished runs to what people read: figures, verdicts, tables, charts and one page."""
