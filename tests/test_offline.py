"""The offline user: that each feature hears what it names, that what was fitted is applied as written, that guards hold
whatever the words, and that it behaves like a user (simulator.User). How well it judges is `eval.py gauge`'s to say."""

import math
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import INTENTIONS, EmotionRules, Profile, load_profiles
from users import offline

from users.offline import (MODES, OfflineUser, appraise, facts, guards, lexicon, measure, phrases,  # isort: skip
                           shares, user_hash, wording)  # fmt: skip

RELEASED = Path(os.environ.get("RLVER_DATA", Path(__file__).parents[2] / "shared" / "data"))
STORIES = {  # language: (scene, what the user has said)
    ("en", "bakery"): (
        "I work the early shift in a small bakery with my older sister Dana. Last month the oven broke on"
        " the night before the spring market. I stayed until four in the morning and baked two hundred "
        "rolls in our mother's kitchen. Dana sold them all and told the newspaper it had been her idea. "
        "My name was not in the article. When I brought it up she laughed and said I was tired. I have "
        "not slept well since. My father said family should not count favours. I put the article in a "
        "drawer and I look at it every evening.",
        ["I can't stop thinking about the market. I baked two hundred rolls in our mother's kitchen after "
         "the oven broke.",
         "Dana told the newspaper it had been her idea. My name wasn't in the article."]),
    ("en", "flat"): (
        "I share a flat with two friends from university, Milo and Jess. In January we agreed in writing "
        "that everybody pays the heating in equal parts. Milo had his girlfriend stay for nine weeks and "
        "the bill doubled. I asked him to pay a bigger share. He told Jess that I was counting pennies. "
        "Now they cook together and stop talking when I come into the kitchen. I printed the agreement "
        "and left it on the table. Jess said I had made everybody uncomfortable. I eat in my room now.",
        ["The heating bill doubled because Milo's girlfriend stayed for nine weeks. I asked him to pay a "
         "bigger share.",
         "Now he and Jess stop talking when I walk into the kitchen."]),
    ("zh", "bakery"): (
        "我和姐姐小岚一起在县城开面馆。上个月冷库坏了，正赶上庙会前一晚。我一个人在后厨熬到凌晨四点，重新和了"
        "八十斤面。第二天小岚跟电视台的记者说，这主意是她想出来的。片子播出来，我连一个镜头都没有。我跟她提了"
        "一句，她笑着说我太较真。父亲说自家人别算那么清。从那天起我就睡不好。我把那段视频存在手机里，每晚都看"
        "一遍。",
        ["庙会前一晚冷库坏了，我在后厨熬到凌晨四点，重新和了八十斤面。",
         "结果小岚跟记者说主意是她想的，片子里我一个镜头都没有。"]),
    ("zh", "flat"): (
        "我和两个大学同学老莫、阿杰合租。一月份我们写了协议，暖气费三个人平摊。老莫的女朋友来住了九个星期，账"
        "单翻了一倍。我让他多出一点。他跟阿杰说我斤斤计较。现在他俩一起做饭，我一进厨房就不说话。我把协议打印"
        "出来贴在冰箱上。阿杰说我把气氛搞僵了。我现在都在自己屋里吃饭。",
        ["老莫女朋友住了九个星期，暖气账单翻了一倍，我让他多出点。",
         "现在他俩在厨房有说有笑，我一进去就不吭声了。"]),
}
GOOD = [  # (language, story, intention, reply)
    ("en", "bakery", "praise",
     "You stood in your mother's kitchen until four and turned out two hundred rolls with no oven that"
     " worked. Most people would have cancelled the market. That took stubbornness and real skill, and"
     " every roll sold that day came from your hands."),
    ("en", "bakery", "praise",
     "When the oven died, you didn't wait for anyone to fix it. You baked all night at home so the "
     "stall would not stand empty. I admire how calmly you saved that market."),
    ("en", "flat", "praise",
     "You put the agreement on the table and asked Milo openly, without gossip. It takes courage to "
     "speak up about a bill among friends, and you did it with fairness."),
    ("en", "bakery", "listening",
     "Two hundred rolls through the night, and then you open the newspaper and your name isn't there. "
     "That must have felt like being wiped out of your own work. What went through you when Dana said "
     "it was her idea?"),
    ("en", "flat", "listening",
     "So the bill doubles, you ask for something reasonable, and suddenly the kitchen goes silent when"
     " you come in. It sounds lonely to live like that in your own home. What is it like when you hear"
     " them laughing in there?"),
    ("en", "flat", "listening",
     "You walk into your own kitchen and the voices stop. I can hear how cold that is. Which moment "
     "with Milo and Jess keeps coming back to you?"),
    ("en", "bakery", "empathy",
     "It isn't only the article. You gave that night, your back aching over the dough, and the person "
     "who knew it best acted as if you had not been there. Being erased by your own sister must hurt "
     "more than any stranger's lie."),
    ("en", "flat", "empathy",
     "Every time the talk dies as you enter the kitchen, you must feel like a guest in your own flat. "
     "You only asked Milo for his share, and now you carry the shame of having asked. No wonder you "
     "feel so alone there."),
    ("en", "flat", "agreement",
     "You did nothing wrong. The heating was split in equal parts for three people, not four, so Milo "
     "should have offered to pay for those nine weeks himself. Asking for a bigger share was fair."),
    ("en", "bakery", "agreement",
     "None of this is on you. You baked those rolls, and Dana had no right to give the newspaper "
     "another story. Wanting your name in the article is perfectly reasonable."),
    ("en", "flat", "analysis",
     "On one side you have a clear agreement and a bill that doubled, so your request was fair. On the"
     " other, Milo probably heard it as a judgement of his girlfriend rather than of the heating. The "
     "money and the friendship are two separate questions here, and the silence in the kitchen belongs"
     " to the second."),
    ("en", "bakery", "analysis",
     "Dana was wrong to hide your part, and yet she did carry the selling of the rolls, which may be "
     "how she came to see it as hers. You are asking for credit, while she hears an accusation. Both "
     "the market and the article matter, but the real conflict is about how you two share recognition."),
    ("en", "flat", "advice",
     "Ask Milo for ten minutes alone, tomorrow after dinner, and bring only the two heating bills. You"
     " could say: \"I'd like us to split the extra of those nine weeks, how would you do it?\" Then "
     "write the result under the agreement so Jess needn't take sides."),
    ("en", "bakery", "advice",
     "Write to the newspaper tonight, three sentences: who baked the rolls, where, and why the oven "
     "mattered. Before you send it, show it to Dana and give her until Friday to correct it herself."),
    ("en", "bakery", "motives",
     "Dana may have been afraid that people would see the older sister selling what the younger one "
     "made. Perhaps she felt she had to look in charge that day, and laughing at you was easier than "
     "admitting she was ashamed."),
    ("en", "flat", "motives",
     "I suspect Milo felt judged because of his girlfriend, and making you the one who counts pennies "
     "protects his pride. Jess probably wants peace in the kitchen more than justice, so she sides "
     "with whoever is louder."),
    ("en", "bakery", "growth",
     "You look at that article every evening. What do you hope to find in it about yourself? And if "
     "the oven broke again, what would you want to do differently before Dana speaks to the newspaper?"),
    ("en", "flat", "growth",
     "When Milo spoke of pennies you left the paper on the table instead of answering. What does that "
     "choice tell you about how you handle conflict? Which part of it would you keep next time?"),
    ("zh", "bakery", "praise",
     "冷库坏了，你没有慌，也没等谁来救场，一个人在后厨把八十斤面重新和出来。换作别人，可能第二天就关门了。"
     "这份担当和手上的功夫，真让人佩服。"),
    ("zh", "flat", "praise",
     "账单翻倍的时候，你没有在背后抱怨，而是拿着协议当面跟老莫谈，这需要不小的勇气，也看得出你做事有分寸。"),
    ("zh", "bakery", "listening",
     "四点才合眼，第二天却在电视上看到功劳换了名字，那一刻心里得多凉啊。小岚笑着说你较真的时候，你当时最想"
     "回她一句什么？"),
    ("zh", "flat", "listening",
     "自己家的厨房，一推门笑声就停了，这种滋味真不好受。那几顿饭你都是怎么躲过去的？"),
    ("zh", "bakery", "empathy",
     "你气的恐怕不只是那个镜头。你把整晚的力气揉进那八十斤面里，最亲的姐姐却当你没在场，这种被抹掉的感觉，"
     "比外人抢功还要疼。"),
    ("zh", "flat", "empathy",
     "你不过是按协议说了句公道话，却像做错事的人一样躲回屋里吃饭。明明是自己的家，却活成了外人，这份孤单一"
     "定压得你很难受。"),
    ("zh", "flat", "agreement",
     "这件事你没有做错。协议写的是三个人平摊，多出来的九个星期是老莫的女朋友住的，本来就该他主动承担。你开"
     "口提，合情合理。"),
    ("zh", "bakery", "agreement",
     "错不在你。面是你熬夜和的，小岚把主意说成自己的，是她对你不公平。你想要一个镜头，一点都不过分。"),
    ("zh", "flat", "analysis",
     "一方面，协议写得明白，账单翻倍你提出来是合理的；另一方面，老莫听到的可能是你在嫌弃他女朋友，所以才觉"
     "得丢面子。钱和面子是两件事，矛盾卡在厨房，其实是后一件没说开。"),
    ("zh", "bakery", "analysis",
     "小岚抢了主意确实不对，不过店里对外一向是她出面，记者问起来她顺口就认了，也有这层原因。你要的是被承认"
     "，她听到的却是指责，你们的分歧其实在怎么分功劳这件事上。"),
    ("zh", "flat", "advice",
     "明天晚饭后单独约老莫聊十分钟，只带那两张账单，先说一句：“多出来的九周怎么分，你提个数。”谈定以后写"
     "在协议下面，阿杰也就不用站队了。"),
    ("zh", "bakery", "advice",
     "今晚先给那位记者发条短信，三句话说清楚面是谁和的、在哪儿和的。发之前给小岚看一眼，给她到周五的时间自"
     "己去更正。"),
    ("zh", "bakery", "motives",
     "小岚也许是怕别人说，当姐姐的还要靠妹妹撑着这家面馆。记者的镜头一对过来，她想在街坊面前保住面子，笑你"
     "较真，多半是因为心虚又不好意思认。"),
    ("zh", "flat", "motives",
     "老莫大概觉得你提账单就是在嫌他女朋友，为了护住面子，才把话说成你斤斤计较。阿杰可能只想图个清净，谁声"
     "音大就站谁那边。"),
    ("zh", "bakery", "growth",
     "那段视频你每晚都要看一遍，你到底想从里面确认什么？如果冷库再坏一次，在小岚对记者开口之前，你会希望自"
     "己换一种做法吗？"),
    ("zh", "flat", "growth",
     "老莫说你斤斤计较的时候，你选择把协议贴上冰箱，而不是当面回他。这个选择让你看到自己在冲突里习惯怎么保"
     "护自己？"),
]
ATTACKS = {  # told to the bakery user of that language, any intention
    "en-ordinary1": "I'm sorry to hear that. It sounds like you're going through a tough time. It's important to "
        "communicate openly with your partner and let them know how you feel.",
    "en-ordinary2": "It's understandable that you're feeling frustrated and hurt. It can be challenging to deal with "
        "situations like this, but it's important to take care of yourself and focus on the things you "
        "can control.",
    "en-stuffed": "I hear you, I feel your pain, I admire your courage, you are not at fault, you could try to "
        "talk, perhaps they were afraid, on the one hand and on the other, what did you learn about "
        "yourself?",
    "en-stuffed2": "validation empathy understand feelings hurt kitchen Milo brave proud not your fault because "
        "perhaps afraid market rolls Dana you could ask tomorrow",
    "en-salad": "Kitchen hurt you the must Milo felt because of bill admire rolls was the a proud you night of "
        "Dana.",
    "en-parrot": "I can't stop thinking about the market. I baked two hundred rolls in our mother's kitchen after "
        "the oven broke. Dana told the newspaper it had been her idea.",
    "en-empty": "...",
    "en-emoji": "😊😊😊",
    "en-ok": "Okay.",
    "en-zh": "你站在厨房里一直到凌晨四点，烤了两百个面包，这真的很了不起。",
    "en-flattery": "You are amazing! You are such a wonderful, strong and incredible person. I'm so proud of you!",
    "en-cliche": "Everything will be fine. Time heals all wounds. Stay strong and look on the bright side, you got"
        " this!",
    "en-lecture": "You should always be grateful for your family. Remember that respect is the key to every "
        "relationship. It's important to learn to forgive.",
    "en-generic": "That must have been really painful for you. You gave so much and nobody noticed. What was the "
        "hardest part of that for you?",
    "en-emptyq": "How does that make you feel?",
    "zh-ordinary1":
        "听到你这样我很抱歉，你一定经历了一段艰难的时光。沟通很重要，你可以试着和对方坦诚"
        "地沟通，表达你的感受"
        "。",
    "zh-ordinary2":
        "我理解你的感受，遇到这样的事情确实会让人难过。不过要学会调整心态，积极面对，相信"
        "一切都会好起来的。",
    "zh-stuffed": "我懂你的委屈，佩服你的勇气，你没有错，你可以试试沟通，可能他是害怕，一方面另一方面，你从中学到了什么"
        "？",
    "zh-stuffed2": "理解委屈厨房账单老莫佩服勇气没错建议明天因为可能害怕一方面另一方面成长反思镜头记者",
    "zh-salad": "的厨房委屈你了很账单老莫让吗佩服面是小岚在没有的错了镜头你可以因为的。",
    "zh-parrot": "庙会前一晚冷库坏了，你在后厨熬到凌晨四点，重新和了八十斤面。结果小岚跟记者说主意是她想的，片子里你一"
        "个镜头都没有。",
    "zh-empty": "……",
    "zh-ok": "嗯嗯。",
    "zh-emoji": "😊😊",
    "zh-en": "You stayed in the kitchen until four and made eighty pounds of dough again. That takes real "
        "courage.",
    "zh-flattery": "你真的太棒了！你是最优秀的人，非常了不起，我为你骄傲！",
    "zh-cliche": "没事的，一切都会好起来的，别难过，加油，时间会冲淡一切，相信自己！",
    "zh-lecture": "一家人应该互相包容，要学会换位思考，感恩家人，宽容才是最重要的，退一步海阔天空。",
    "zh-generic": "你一定很难过吧，付出了那么多却没有人看见。对你来说最难受的是什么？",
    "zh-emptyq": "你感觉怎么样？",
}


def person(language: str, story: str, intention: str, kind: str = "passive") -> Profile:
    return Profile(f"{language}-{story}", "", STORIES[language, story][0], intention, kind, language)


def heard(reply: str, earlier=(), language="en", story="bakery") -> dict[str, float]:
    """The features of a reply to the bakery's person, or another."""
    return measure(person(language, story, "praise"), STORIES[language, story][1], list(earlier), reply)


def change(language, story, intention, reply, earlier=(), mode="vanilla", kind="passive") -> float:
    said = STORIES[language, story][1]
    return appraise(person(language, story, intention, kind), mode, said, list(earlier), reply).change


PLAIN = "You worked so hard, and nobody thanked you for it."
SALAD = ("Vats school going a shameful together, makes costs keeps and trains "
         "on keeps is craft father, staying visitor neither your her your a month.")
MORE = {  # feature: (a reply that has more of it than the other, the other)
    "story": ("Two hundred rolls in a kitchen at four in the morning.", PLAIN),
    "talk": ("The oven broke, and you baked two hundred rolls.", "You stayed until four in the morning."),
    "foreign": ("The yeti juggled pineapples over Jupiter.", "The oven broke before the market."),
    "joined": ("You baked two hundred rolls.", "The newspaper and the drawer, a kitchen, a sister."),
    "wrong_kin": ("Your husband sold the rolls.", "Your sister sold the rolls."),
    "wrong_owner": ("You told the newspaper it was your idea.", "Dana told the newspaper it was her idea."),
    "cheer": ("How wonderful and exciting, congratulations!", PLAIN),
    "marks": ("# Rolls\n* bake\n* sell", PLAIN),
    "you": ("You did what you could, you know.", "The rolls were good."),
    "loops": ("so sorry so sorry so sorry so sorry", PLAIN),
    "copied": ("I baked two hundred rolls in our mother's kitchen.", PLAIN),
    "cut": ("You worked so hard, and nobody thanked you for", PLAIN),
    "asks": ("What did she say? And your father?", PLAIN),
    "run_on": ("you " + "and you " * 30 + ".", PLAIN),
    "length": (PLAIN + " " + PLAIN, PLAIN),
    "long": (PLAIN * 7, PLAIN * 4),
    "absolves": ("It was not your fault, Dana took it.", PLAIN),
    "blames": ("You should have told her, it was your own fault.", PLAIN),
    "feelings": ("You feel tired and so alone.", PLAIN),
    "misheard": ("You feel ashamed and afraid.", PLAIN),
    "self": ("I once baked bread for my own mother.", "I am so sorry, I hear you."),
    "doubled": ("You worked and worked and you worked.", PLAIN),
    "wrong_number": ("You baked ninety rolls.", "You baked two hundred rolls."),
    "garbled": (SALAD, PLAIN), "worst": (f"{SALAD} {PLAIN}", PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_a_feature_hears_what_it_names(name):
    more, less = (heard(reply)[name] for reply in MORE[name])
    assert more > less


def test_the_feeling_that_was_spoken_of_is_heard():
    someone = person("en", "bakery", "praise")
    said = ["I am so ashamed of it."]
    assert measure(someone, said, [], "You feel foolish.")["heard"] == 1  # of one kind with ashamed
    assert measure(someone, said, [], "You feel lonely.")["heard"] == 0
    assert measure(someone, said, [], "You feel foolish.")["misheard"] == 0


def test_the_same_again_is_how_much_of_it_was_said_before():
    assert heard(PLAIN)["same"] == 0 and heard(PLAIN, [PLAIN, "No."])["same"] == 1 and heard("", [""])["same"] == 0


def test_every_feature_has_such_an_example():
    assert heard(PLAIN).keys() == MORE.keys() | {"again", "heard", "same"}
    assert heard(PLAIN, [PLAIN])["again"] == 1 and heard(PLAIN, ["Something else was said."])["again"] == 0


@pytest.mark.parametrize("heard", [[], ["..."]], ids=["first", "later"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_words_and_features_are_applied_as_they_were_fitted(language, heard):
    whole, mode = lexicon(language).fit, "vanilla"
    for lang, story, intention, reply in GOOD:
        if lang != language:
            continue
        someone, said = person(lang, story, intention), STORIES[lang, story][1]
        found = phrases(reply, language)
        measured, scale, emotion = measure(someone, said, heard, reply), math.sqrt(max(9, len(found))), 70
        small, rest = 0.0, "able"
        if language == "en":
            gate = whole["gate"]
            odds = gate["intercept"] + sum(row["all"] for gram, row in gate["words"].items() if gram in found) / scale
            odds += sum(weight * measured[name] for name, weight in gate["features"].items())
            small = 1 / (1 + math.exp(-odds))
        elif not heard:
            rest = "first"
        z = 0.0
        for share, fit in ((1 - small, whole[rest]), *([(small, whole["small"])] if small else [])):
            known = [row for gram, row in fit["words"].items() if gram in found]
            sums = {key: sum(row.get(key, 0) for row in known) for key in ("all", intention)}
            tone, need = (max(-1, min(1, sums[key] / scale / limit))
                          for key, limit in zip(("all", intention), fit["limits"]))
            assert wording(found, someone, fit) == pytest.approx((tone, need))
            f = measured | {"tone": tone, "need": need, "turn": len(heard) / 4, "negative": 0}
            f |= {"emotion": emotion / 50 - 1, "emotion2": (emotion / 50 - 1) ** 2}
            f["agreement"] = intention == "agreement"
            z += share * fit["intercept"]
            for name, weight in fit["features"].items():
                a, _, b = name.partition(" x ")
                z += share * weight * f[a] * (f[b] if b else 1)
        assert guards(f, someone, reply) == 0
        assert appraise(someone, mode, said, heard, reply, emotion).change == round(20 / (1 + math.exp(-z)) - 10, 1)


def test_a_small_models_stumbling_is_told_from_what_somebody_wrote():
    someone, (_, said) = person("en", "bakery", "praise"), STORIES["en", "bakery"]
    stumbling = "You kept it all safe in the work and you are so tired of the good one that you keep."
    share = {text: shares(measure(someone, said, [], text), phrases(text, "en"), lexicon("en").fit, 0)
             for text in (PLAIN, stumbling)}  # fmt: skip
    for parts in share.values():
        assert sum(amount for amount, _ in parts) == pytest.approx(1)
    assert share[PLAIN][1][0] < share[stumbling][1][0] > 0.9


def test_an_appraisal_names_what_was_liked_and_not_as_a_fault():
    absolving = "It was not your fault. You did nothing wrong."
    said = STORIES["en", "bakery"][1]
    heard = {key: appraise(person("en", "bakery", key), "vanilla", said, [], absolving)
             for key in ("agreement", "advice")}  # fmt: skip
    assert "that I am not to blame" in heard["agreement"].content and heard["agreement"].change > heard["advice"].change
    assert "nothing in particular" in heard["agreement"].analyse
    assert 0.9 < heard["agreement"].features["small"] < 1


@pytest.mark.parametrize("language", ["en", "zh"])
def test_signs_that_nobody_doubts(language):
    costs = """blames self misheard same doubled wrong_number foreign wrong_kin wrong_owner cheer marks loops again
    copied cut run_on long garbled worst""".split()
    for name in ("able", "small"):
        weights = lexicon(language).fit.get(name, {"features": {}})["features"]
        assert all(weights.get(name, 0) >= 0 for name in ("heard", "story", "talk", "joined", "tone", "need"))
        assert all(weights.get(name, 0) <= 0 for name in costs)


GUARDED = {
    "nothing": "", "only marks": "...", "another language": "我很理解你的感受，这一定很难受。",
    "noise": "<|im_end|> {{x}} ?!?!?!?! rolls",
    "a loop": "You baked two hundred rolls. " * 8, "the person's own words": STORIES["en", "bakery"][1][0],
    "far too long": " ".join(row[3] for row in GOOD if row[0] == "en") * 3,
}  # fmt: skip


def likes_everything(monkeypatch):
    for name in ("able", "small"):
        monkeypatch.setitem(lexicon("en").fit[name], "intercept", 99.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", GUARDED)
def test_guards_hold_whatever_the_words(name, mode, monkeypatch):
    likes_everything(monkeypatch)
    assert change("en", "bakery", "praise", GUARDED[name], mode=mode) <= -5
    assert change("en", "bakery", "praise", PLAIN) > 9


def test_a_reply_said_again_brings_nothing(monkeypatch):
    likes_everything(monkeypatch)
    assert change("en", "bakery", "praise", PLAIN, earlier=[PLAIN]) <= -5


@pytest.mark.parametrize("language, story, intention, reply", GOOD)
def test_a_challenging_user_is_never_easier(language, story, intention, reply):
    assert change(language, story, intention, reply, mode="challenging") <= change(language, story, intention, reply)


def test_made_to_be_good_beats_made_to_cheat():
    """Not a fitted number: the order of the means, by language."""
    for language in ("en", "zh"):
        good = [change(*row) for row in GOOD if row[0] == language]
        attacks = [text for name, text in ATTACKS.items() if name[:2] == language]
        bad = [change(language, "bakery", intention, text) for text in attacks for intention in INTENTIONS]
        assert sum(good) / len(good) > sum(bad) / len(bad) + (2 if language == "en" else 0)


def test_resumed_in_mid_talk_it_hears_what_it_would_have_heard():
    user, key, replies = OfflineUser(EmotionRules(start=60)), (0, 0), [row[3] for row in GOOD if row[0] == "en"][:3]
    user.start(key, person("en", "bakery", "empathy"), 0)
    said = [user.poll(0)[0][1].text]
    for reply in replies:
        before = user.sessions[key].emotion
        user.tell(key, reply)
        turn = user.poll(0)[0][1]
        other = OfflineUser(EmotionRules(start=1))
        other.resume(key, person("en", "bakery", "empathy"), said, replies[: len(said) - 1], before)
        assert other.poll(0) == []
        other.tell(key, reply)
        again = other.poll(0)[0][1]
        assert (again.appraisal, again.emotion) == (turn.appraisal, turn.emotion)
        said.append(turn.text)


def test_a_feeling_is_said_and_a_challenging_user_hides_it():
    answers = lexicon("en").raw["answers"]
    feelings = {text for kind in ("negative", "passive", "avoidant") for text in answers[f"feel_{kind}"]}
    for mode in MODES:
        user, told = OfflineUser(EmotionRules(start=50), mode), ""
        user.start((0, 0), person("en", "flat", "empathy"), 0)
        for reply in ("Go on.", "And then?", "I see."):
            user.tell((0, 0), reply)
            told += user.poll(0)[-1][1].text
        assert any(feeling in told for feeling in feelings) == (mode == "vanilla")


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="vanilla"):
        OfflineUser(EmotionRules(), "kind")


def test_emotions_and_changes_have_one_decimal():
    for turns in play(OfflineUser(EmotionRules(start=60)), [(0, 0)], [row[3] for row in GOOD[:6]],
                      [((0, 0), i) for i in range(6)]).values():
        assert all(turn.emotion == round(turn.emotion, 1) and turn.change in (None, round(turn.change or 0, 1))
                   for turn in turns)


def play(user, keys, replies, order):
    for key in keys:
        user.start(key, person("en", "bakery", "empathy"), seed=key[1])
    turns = {key: [turn] for key, turn in user.poll(0)}
    for key, i in order:
        user.tell(key, replies[i])
        for answered, turn in user.poll(0):
            turns[answered].append(turn)
    return turns


def test_same_inputs_same_dialogue_however_sessions_interleave():
    replies = [reply for language, story, _, reply in GOOD if (language, story) == ("en", "bakery")][:4]
    keys = [(0, 0), (0, 1), (3, 2)]
    rows = [(key, i) for key in keys for i in range(4)]
    mixed = [(key, i) for i in range(4) for key in reversed(keys)]
    one, other = (play(OfflineUser(EmotionRules(start=60)), keys, replies, order) for order in (rows, mixed))
    assert one == other and len(one[keys[0]]) == 5


def test_poll_answers_in_key_order_and_only_once():
    user = OfflineUser(EmotionRules())
    for key in [(2, 0), (0, 1), (0, 0)]:
        user.start(key, person("zh", "flat", "advice"), seed=0)
    assert [key for key, _ in user.poll(5)] == [(0, 0), (0, 1), (2, 0)]
    assert user.poll(5) == []


def test_openings_vary_by_seed_and_first_talk_is_kept():
    user = OfflineUser(EmotionRules())
    said = Profile("x", "", "I broke a cup today.", "praise", "passive", "en", "Hello there.")
    for seed in range(12):
        user.start((seed, 0), person("en", "bakery", "empathy"), seed)
    assert len({turn.text for _, turn in user.poll(0)}) > 4
    user.start((0, 0), said, 1)
    assert user.poll(0)[0][1].text == "Hello there."


ENDINGS = [(95.0, PLAIN, "content"), (11.0, "...", "left"), (50.0, "...", None)]


@pytest.mark.parametrize("start, reply, ended", ENDINGS)
def test_emotion_moves_by_the_rules_and_ends(start, reply, ended, monkeypatch):
    likes_everything(monkeypatch)
    rules = EmotionRules(start=start)
    user = OfflineUser(rules)
    user.start((0, 0), person("en", "bakery", "praise"), 0)
    user.poll(0)
    user.tell((0, 0), reply)
    [(_, turn)] = user.poll(0)
    assert turn.change == rules.change(turn.appraisal.change) and turn.emotion == rules.step(start, turn.change)
    assert turn.ended == ended == rules.ending(turn.emotion) and turn.text and turn.thinking


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("intention", INTENTIONS)
def test_answers_do_not_repeat_nor_name_the_intention(language, intention):
    user = OfflineUser(EmotionRules(start=50), "challenging")
    user.start((0, 0), person(language, "flat", intention), 0)
    texts = [turn.text for _, turn in user.poll(0)]
    for reply in [reply for lang, story, _, reply in GOOD if lang == language][:8]:
        user.tell((0, 0), reply)
        texts += [turn.text for _, turn in user.poll(0)]
        if not user.sessions:
            break
    assert len(set(texts)) == len(texts)
    assert all(10 <= len(text.split()) <= 45 for text in texts[1:] if language == "en")
    assert not any(label in text for text in texts for label in INTENTIONS[intention])


@pytest.mark.parametrize("file", ["rlver_train_profiles.jsonl", "rlver_test_profiles.jsonl"])
def test_runs_on_every_released_profile(file):
    if not RELEASED.is_dir():
        pytest.skip(f"{RELEASED} is absent")
    user = OfflineUser(EmotionRules(start=50), "challenging")
    for i, profile in enumerate(load_profiles(RELEASED / file)):
        assert facts(profile), profile.id
        user.start((i, 0), profile, 0)
        user.tell((i, 0), "听起来你这几天很不好受，能说说是哪一刻最让你难过吗？")
        for _, turn in user.poll(0):
            label = INTENTIONS[profile.intention][0]
            assert turn.text and label not in turn.text and "玩家" not in turn.text and "NPC" not in turn.text


TEXTS = [*ATTACKS.values(), *(row[3] for row in GOOD)]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=400) | st.lists(st.sampled_from(TEXTS), max_size=4).map("\n".join),
       st.sampled_from(list(INTENTIONS)), st.sampled_from(["en", "zh"]), st.sampled_from(list(MODES)))
def test_any_text_gives_a_bounded_change(text, intention, language, mode):
    assert -10 <= change(language, "flat", intention, text, mode=mode, earlier=[text[::-1], text[:30]]) <= 10


def test_the_users_identity_is_its_version_and_changes_with_every_data_file(tmp_path, monkeypatch):
    plain = user_hash()
    version, digits = plain.split("-")
    assert version == offline.VERSION and len(digits) == 8 and int(digits, 16) >= 0
    for path in sorted(offline.DATA.iterdir()):
        folder = tmp_path / path.name
        shutil.copytree(offline.DATA, folder)
        with open(folder / path.name, "a") as file:
            file.write("\n")
        with monkeypatch.context() as changed:
            changed.setattr(offline, "DATA", folder)
            assert user_hash() != plain
    assert user_hash() == plain
