"""The mechanism, private: hooks that cut, a tap that reads attention, a cache that remembers what was dropped."""
