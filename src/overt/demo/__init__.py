"""One writeback error under a thousand overlays: who is told? See overt.demo.scenario."""
