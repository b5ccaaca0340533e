"""Many questions from a file, answered into another: resumable, in order, within bounded memory."""
