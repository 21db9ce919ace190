"""What a run leaves for a person to look at: pictures, plots and one HTML page.

`pictures` turns tensors into PNG bytes, `plots` turns training records into SVG bytes (drawn with `svg`),
`page` lays both out in one self-contained file (written with `markup`), and `quickstart_page` says what the
page of `aligntok quickstart` contains and in which order (reading the results with `findings`).
"""
