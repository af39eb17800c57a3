"""The set of scenes that this repo draws itself: pictures, captions, and scores of their facts."""
