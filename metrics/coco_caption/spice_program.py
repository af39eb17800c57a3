"""SPICE's own classes in a process of their own: `spice.py` starts this file, asks in lines of JSON and reads lines of JSON.

Run as a script, never imported for its functions: a JVM lives as long as the Python process that holds it, and a crash or
a full heap must end no more than SPICE. Requests are `{"parse": [caption, ...]}`, answered with the tuples of each
caption, and `{"score": [[tuples of the caption, [tuples of each reference, ...]], ...]}`, answered image by image with the
counts of each category and the tuples that were matched, wrong and missed.

The command line of SPICE does the same, but writes its result through a JavaScript engine, which no Java has had since
version 15, and keeps its cache with a native library for x86-64.
"""

import json
import os
import sys

CATEGORIES = ("Object", "Attribute", "Relation", "Color", "Cardinality", "Size")


def main():
    libjvm, heap, threads, quick, *jars = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps what Java prints out of the answers
    import jpype

    # HotSpot numbers objects at random, and SPICE merges equally similar nodes in the order of these numbers.
    options = [
        f"-Xmx{heap}",
        "-XX:+ExitOnOutOfMemoryError",
        "-Xss16m",
        "-Dfile.encoding=UTF-8",
        "-Djava.awt.headless=true",
    ]
    options += ["-Duser.language=en", "-Duser.country=US"]
    if quick == "quick":
        options.append("-XX:TieredStopAtLevel=1")
    jpype.startJVM(libjvm, *options, classpath=jars)
    program = Program(jpype, int(threads))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        (task,) = request
        try:
            answer = program.parse(request["parse"]) if task == "parse" else program.score(request["score"])
        except jpype.JException as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # CoreNLP's threads would keep the JVM


class Program:
    """The few classes of SPICE that make tuples of captions, and scores of tuples."""

    def __init__(self, jpype, threads: int):
        spice, url = jpype.JPackage("edu").anu.spice, jpype.JClass("java.net.URL")
        self.spice, self.threads, self.jpype = spice, threads, jpype
        self.json = jpype.JClass("org.json.simple.JSONValue")
        folder = jpype.JClass("edu.cmu.meteor.util.Constants").DEFAULT_SYN_DIR_URL.toString()
        files = [url(f"{folder}/english.{name}") for name in ("exceptions", "synsets", "relations")]
        self.synonyms = jpype.JClass("edu.cmu.meteor.aligner.SynonymDictionary")(*files)
        names = [f"{category.lower()}Filter" for category in CATEGORIES]
        self.filters = [self._static(spice.TupleFilter, name) for name in names]
        self.parser = None

    @staticmethod
    def _static(owner, name: str):
        field = owner.class_.getDeclaredField(name)
        field.setAccessible(True)
        return field.get(None)

    def parse(self, captions: list[str]) -> list[list[list[str]]]:
        """The tuples of each caption: of an object, an object and its attribute, two objects and their relation."""
        if self.parser is None:  # reads the models: some seconds
            self.parser = self.spice.SpiceParser(None, self.threads, True)
            self.generate = self.spice.SpiceParser.class_.getDeclaredMethod(
                "generateTuples", self.jpype.JClass("java.util.List").class_
            )
            self.generate.setAccessible(True)
        texts = self.jpype.JClass("java.util.ArrayList")(captions)
        tuples_of = json.loads(str(self.json.toJSONString(self.generate.invoke(self.parser, texts))))
        return [tuples_of[caption] for caption in captions]

    def score(self, images: list) -> list[dict]:
        return [self._score(caption, references) for caption, references in images]

    def _score(self, caption: list, references: list[list]) -> dict:
        evaluation = self.spice.Evaluation
        graphs = [self._graph(caption), self._graph([part for reference in references for part in reference])]
        sets = [self.spice.TupleSet(graph) for graph in graphs]
        total = evaluation(*sets, False, True)
        of_caption, of_references = (
            [
                (bool(proposition.truthValue), [str(part) for part in proposition.tuple])
                for proposition in map(group.get, range(group.size()))
            ]
            for group in sets
        )
        answer = {"All": [total.tp, total.fp, total.fn, total.f]}
        for name, tuple_filter in zip(CATEGORIES, self.filters, strict=True):
            part = evaluation(*(self.spice.TupleSet(graph, tuple_filter) for graph in graphs), True, True)
            answer[name] = [part.tp, part.fp, part.fn, part.f if part.f == part.f else None]
        answer["matched"] = [words for true, words in of_caption if true]
        answer["wrong"] = [words for true, words in of_caption if not true]
        answer["missed"] = [words for true, words in of_references if not true]
        return answer

    def _graph(self, tuples: list[list[str]]):
        graph = self.spice.SceneGraph(self.synonyms, True)
        for words in self.json.parse(json.dumps(tuples)):  # its arrays are ArrayLists, as addTuple wants them
            graph.addTuple(words)
        return graph


if __name__ == "__main__":
    main()
