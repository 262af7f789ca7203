"""The pages, one file each: `build(place)` draws one, and is all that the server knows of it."""
